"""Owners and data owners as real processes on 127.0.0.1, each known by a mark that all it starts inherits."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedproxy.federation.keys import add_client, client_key_file, init_keys

WORDS = {"animals": ["cat", "dog"], "colours": ["red", "blue"], "numbers": ["one", "two"]}
PATIENCE = 90.0
MARK = "FEDPROXY_TEST_MARK"


def eventually(holds: Callable[[], object], seconds: float = PATIENCE, pause: float = 0.02) -> bool:
    """Whether it holds within so many seconds."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(pause)
    return True


class Process:
    """A command of fedproxy.

    Args:
        arguments: Its arguments.
        log: File for what it prints.
        command: What to start instead of fedproxy.
    """

    def __init__(self, arguments: list[str], log: Path, command: list[str] | None = None, **environment: str) -> None:
        self.mark, self.log = uuid.uuid4().hex, log
        with open(log, "ab") as output:
            self._begin = output.tell()
            self._process = subprocess.Popen(
                [*(command or [sys.executable, "-m", "fedproxy"]), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400", MARK: self.mark, **environment},
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        return self._process.poll()

    @property
    def said(self) -> str:
        """What it printed."""
        return self.log.read_bytes()[self._begin :].decode(errors="replace")

    def family(self, name: str = "") -> list[int]:
        """Processes that it started, directly or not, and itself; with `name`, those whose command holds it."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                mine = f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
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
        self._process.kill()
        self._process.wait()

    def clear(self) -> None:
        """Kill it and all it started."""
        while family := self.family():
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self._process.wait()


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
        for name, words in WORDS.items():
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

    def start(self, log: str, *arguments: object, **how: object) -> Process:
        process = Process([str(argument) for argument in arguments], self.folder / f"{log}.log", **how)  # type: ignore[arg-type]
        self._processes.append(process)
        return process

    def federate(self, out: str, *flags: str) -> Process:
        """The same experiment with all clients on this machine."""
        return self.start(out, "federate", self.experiment, "--out", self.folder / out, *flags)

    def serve(self, out: str, *flags: str, secure: bool = True, ready: bool = True) -> Process:
        """Start the owner's process, at the address of the one before if there was one, and wait until it listens."""
        how = ["--keys", self.keys] if secure else ["--insecure"]
        listen = self.address or "127.0.0.1:0"
        process = self.start("serve", "serve", self.experiment, "--out", self.folder / out, *how, "--listen", listen, *flags)
        if ready:
            process.says("Clients can join at ")
            self.address = process.said.partition("Clients can join at ")[2].split()[0].rstrip(".")
        return process

    def join(self, name: str, *flags: object, key: Path | None = None, cache: str = "cache", **how: object) -> Process:
        """Start a data owner's process."""
        arguments = ["join", self.address, "--data", self.folder / f"{name}.jsonl", "--cache", self.folder / cache]
        if "--insecure" not in flags:
            arguments += ["--key", key or client_key_file(self.keys, name)]
        return self.start(f"join-{name}", *arguments, *flags, **how)

    def join_all(self, *flags: object) -> dict[str, Process]:
        return {name: self.join(name, *flags) for name in WORDS}

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

    def adapter(self, out: str) -> bytes:
        return (self.folder / out / "adapter" / "adapter_model.safetensors").read_bytes()

    def clear(self) -> None:
        for process in self._processes:
            process.clear()


@pytest.fixture
def federation(tmp_path: Path, tiny_checkpoint, calibration) -> Iterator[Callable[..., Federation]]:
    """A function that makes a federation: `federation(rounds=2, quorum=1.0)`."""
    made: list[Federation] = []

    def make(**settings: object) -> Federation:
        folder = tmp_path / f"federation-{len(made)}"
        folder.mkdir()
        made.append(Federation(folder, tiny_checkpoint(), calibration, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.clear()
