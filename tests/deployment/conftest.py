"""Owners and data owners as real processes on 127.0.0.1, each known by a mark that all it starts inherits."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fedproxy.cli import main
from fedproxy.cli.output import console
from fedproxy.deployment.keys import add_client, client_key_file, init_keys

WORDS = {"animals": ["cat", "dog"], "colours": ["red", "blue"], "numbers": ["one", "two"]}
PATIENCE = 240.0
MARK = "FEDPROXY_TEST_MARK"


def eventually(holds: Callable[[], object], seconds: float = PATIENCE, pause: float = 0.05) -> bool:
    """Whether it holds within so many seconds."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(pause)
    return True


class Process:
    """A process of a test, in a session of its own.

    Args:
        log: File for what it prints.
        start: Starts it and returns its id, given the environment and the file for its output.
    """

    def __init__(self, log: Path, start: Callable[[dict[str, str], int], int]) -> None:
        self.mark, self.log, self._code = uuid.uuid4().hex, log, None
        with open(log, "ab") as output:
            self._begin = output.tell()
            path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
            fixed = {"PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "400", MARK: self.mark}
            environment = {**os.environ, **fixed}
            self.pid = start(environment, output.fileno())

    @property
    def code(self) -> int | None:
        """Its exit code once it has ended; minus the signal if one ended it."""
        if self._code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    @property
    def said(self) -> str:
        """What it printed."""
        return self.log.read_bytes()[self._begin :].decode(errors="replace")

    def family(self, name: str = "") -> list[int]:
        """Processes that it started, directly or not, and itself; with `name`, those whose command holds it."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                mine = folder.name == str(self.pid) and self.code is None
                mine = mine or f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
                if mine and name in (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                    found.append(int(folder.name))
        return found

    def says(self, text: str) -> None:
        """Wait until it prints `text`."""
        assert eventually(lambda: text in self.said or self.code is not None), self.said
        assert text in self.said, self.said

    def ends(self, code: int = 0) -> str:
        """Wait until it ends, with this code, and nothing of it is left; gives what it printed."""
        assert eventually(lambda: self.code is not None), self.said
        assert self.code == code, self.said
        assert eventually(lambda: not self.family(), 10.0), self.said
        return self.said

    def kill(self) -> None:
        """kill -9, of this process alone."""
        os.kill(self.pid, signal.SIGKILL)
        eventually(lambda: self.code is not None)

    def clear(self) -> None:
        """Kill it and all it started."""
        while family := self.family():
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            eventually(lambda: self.code is not None)


def forked(arguments: list[str]) -> Callable[[dict[str, str], int], int]:
    """Starts `fedproxy ARGUMENT...` as a fork of this process, which has imported torch and the rest already."""

    def start(environment: dict[str, str], output: int) -> int:
        child = os.fork()
        if child:
            return child
        code: object = 1
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.closerange(3, 4096)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.environ.clear()
            os.environ.update(environment)
            warnings.resetwarnings()
            warnings.simplefilter("ignore")
            logging.getLogger().handlers.clear()
            console.cache_clear()
            main(arguments)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    return start


def executed(command: list[str]) -> Callable[[dict[str, str], int], int]:
    """Starts a command."""

    def start(environment: dict[str, str], output: int) -> int:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        process.returncode = 0  # its Process waits for it
        return process.pid

    return start


FEDPROXY = [sys.executable, "-m", "fedproxy"]


class Federation:
    """An experiment of three clients, their keys, and processes that take part in it.

    Args:
        folder: Where all of it lies.
        llm: The LLM.
        calibration: The calibration text.
        rows: Rows of each client; a round takes an optimizer step for every four.
        settings: Of the table [federate].
    """

    def __init__(self, folder: Path, llm: Path, calibration: Path, *, rows: int = 4, **settings: object) -> None:
        self.folder, self.keys = folder, folder / "keys"
        self._processes: list[Process] = []
        self.address = ""
        self.experiment = folder / "experiment.toml"
        tables = ""
        for name in WORDS:
            self.write_rows(name, rows)
            tables += f'[[client]]\nname = "{name}"\ndata = "{name}.jsonl"\n'
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        self.experiment.write_text(
            f'name = "words"\n[llm]\npath = "{llm}"\n[compress]\ncalibration = "{calibration}"\nmax_length = 32\n'
            f"{tables}[train]\nbatch_size = 4\nlearning_rate = 1e-2\nlora_r = 2\nlora_alpha = 4\nlora_dropout = 0.1\n"
            f"max_length = 32\n[federate]\nregulariser_strength = 1.0\n{lines}"
        )
        init_keys(self.keys)
        for name in WORDS:
            add_client(self.keys, name)

    def write_rows(self, name: str, rows: int) -> Path:
        path = self.folder / f"{name}.jsonl"
        lines = [
            {"prompt": f"say {WORDS[name][i % 2]} {i}:", "completion": f" {WORDS[name][i % 2]}"} for i in range(rows)
        ]
        path.write_text("\n".join(map(json.dumps, lines)))
        return path

    def start(self, log: str, *arguments: object, command: Sequence[str] = ()) -> Process:
        """Start `fedproxy ARGUMENT...`; with `command` by executing that, otherwise by forking this process."""
        words = [str(argument) for argument in arguments]
        how = executed([*command, *words]) if command else forked(words)
        self._processes.append(Process(self.folder / f"{log}.log", how))
        return self._processes[-1]

    def federate(self, out: str, *flags: str) -> Process:
        """The same experiment with all clients on this machine."""
        return self.start(out, "federate", self.experiment, "--out", self.folder / out, *flags)

    def serve(
        self, out: str, *flags: str, secure: bool = True, ready: bool = True, command: Sequence[str] = ()
    ) -> Process:
        """Start the owner's process, at the address of the one before if there was one, and wait until it listens."""
        how = ["--keys", self.keys] if secure else ["--insecure"]
        listen = self.address or "127.0.0.1:0"
        where = ["--out", self.folder / out, "--listen", listen]
        process = self.start("serve", "serve", self.experiment, *where, *how, *flags, command=command)
        if ready:
            process.says("Clients can join at ")
            self.address = process.said.partition("Clients can join at ")[2].split()[0].rstrip(".")
        return process

    def join(
        self,
        name: str,
        *flags: object,
        key: Path | None = None,
        cache: str = "cache",
        log: str = "",
        command: Sequence[str] = (),
    ) -> Process:
        """Start a data owner's process."""
        arguments = ["join", self.address, "--data", self.folder / f"{name}.jsonl", "--cache", self.folder / cache]
        arguments += ["--min-rows", 1, "--min-steps", 1]
        if "--insecure" not in flags:
            arguments += ["--key", key or client_key_file(self.keys, name)]
        return self.start(log or f"join-{name}", *arguments, *flags, command=command)

    def join_all(self, *flags: object, command: Sequence[str] = ()) -> dict[str, Process]:
        return {name: self.join(name, *flags, command=command) for name in WORDS}

    def events(self, out: str, kind: str) -> list[dict[str, object]]:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / out / "events.jsonl").read_text().splitlines()
            return [event for event in map(json.loads, lines) if event["event"] == kind]
        return []

    def opened(self, out: str, number: int) -> None:
        """Wait until round `number` was opened."""
        assert eventually(lambda: any(event["round"] == number for event in self.events(out, "round_opened")))

    def record(self, out: str, number: int) -> dict[str, object]:
        return json.loads((self.folder / out / "rounds" / f"{number:04d}" / "round.json").read_text())

    def rounds(self, out: str) -> dict[str, bytes]:
        """The files of every complete round."""
        folder = self.folder / out / "rounds"
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("0*/*"))}

    def adapter(self, out: str) -> bytes:
        return (self.folder / out / "adapter" / "adapter_model.safetensors").read_bytes()

    def clear(self) -> None:
        for process in self._processes:
            process.clear()


@pytest.fixture
def federation(tmp_path: Path, tiny_checkpoint, calibration) -> Iterator[Callable[..., Federation]]:
    """A function that makes a federation: `federation(rounds=2, quorum=3)`; it may be called once."""
    with contextlib.ExitStack() as stack:

        def make(**settings: object) -> Federation:
            one = Federation(tmp_path, tiny_checkpoint(), calibration, **settings)  # type: ignore[arg-type]
            stack.callback(one.clear)
            return one

        yield make
