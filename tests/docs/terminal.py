"""A reader's terminals: the commands of a page are typed into a shell, and must print what the page says."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedproxy.deployment.flower.ports import reserve_port

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PATIENCE = 900.0
_RESERVED: list[socket.socket] = []
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    """Commands, and lines that they print; "…" stands for what is not always the same."""

    commands: str
    terminal: str = "reader"
    folder: str = "."
    stays: bool = False
    prints: list[str] = field(default_factory=list)


def fenced(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block of a page."""
    return _FENCED.findall(page.read_text())


class Terminal:
    """A shell in a folder, into which commands are typed once the ones before have ended."""

    def __init__(self, folder: Path, log: Path, home: Path, settings: Mapping[str, str]) -> None:
        scripts = os.path.dirname(sys.executable)
        environment = {key: value for key, value in os.environ.items() if key not in ("XDG_CACHE_HOME", "FLWR_HOME")}
        environment |= {
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "COLUMNS": "160",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            **settings,
        }
        self._log, self._mark, self._code = log, "", 0
        with open(log, "wb") as output:
            self._shell = subprocess.Popen(
                ["bash", "--norc"],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
                preexec_fn=_heed_interrupts,
            )
        self._send("trap 'FAILED=$((FAILED + 1))' ERR")

    def _send(self, text: str) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.write(f"{text}\n".encode())
        self._shell.stdin.flush()

    @property
    def said(self) -> str:
        return re.sub(r"\s+", " ", self._log.read_text(errors="replace"))

    def type(self, commands: str) -> None:
        """Type commands; `$?` is what the ones before left."""
        self._mark = uuid.uuid4().hex
        self._send(f"FAILED={-int(self._code != 0)}\n(exit {self._code})\n{commands}\necho {self._mark} $? $FAILED")

    def wait(self) -> tuple[int, bool]:
        """Wait until the prompt would come back: the last exit code, and whether any command failed."""
        if not self._mark:
            return 0, False
        ended = re.compile(rf"{self._mark} (\d+) (-?\d+)")
        self.until(lambda: ended.search(self.said) is not None, "the end of its commands")
        code, failed = ended.findall(self.said)[-1]
        self._code = int(code)
        return self._code, failed != "0"

    def prints(self, lines: list[str]) -> None:
        """Wait until it has printed these lines."""
        for line in filter(None, map(str.strip, lines)):
            pattern = re.sub(r"\s+", " ", line)
            wanted = re.compile(re.escape(pattern).replace("…", r"\S+"))
            self.until(lambda wanted=wanted: wanted.search(self.said) is not None, line)

    def until(self, holds, what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert self._shell.poll() is None, f"the shell ended\n{self._log.read_text()}"
            assert time.monotonic() < end, f"in vain waited for {what!r} in\n{self._log.read_text()}"
            time.sleep(0.1)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait()
        assert self._shell.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._shell.stdin.close()


def _heed_interrupts() -> None:
    """Undo what tests started in the background inherit: a shell that ignores Ctrl-C can never unlearn it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def follow(
    blocks: Sequence[Block], home: Path, *, instead: Mapping[str, str], settings: Mapping[str, str] | None = None
) -> Iterator[dict[str, Terminal]]:
    """Type the blocks one after the other, as a reader does, and yield the terminals when all commands have ended.

    Args:
        blocks: What to type, where, and what it must print.
        home: The reader's home, in which the blocks' folders lie.
        instead: What to type instead of what the page says, such as another port.
        settings: Further environment variables.
    """

    def typed(text: str) -> str:
        for said, meant in instead.items():
            text = text.replace(said, meant)
        return text

    terminals: dict[str, Terminal] = {}
    try:
        for number, block in enumerate(blocks):
            if block.terminal not in terminals:
                log = home / f"{block.terminal}.log"
                terminals[block.terminal] = Terminal(home / block.folder, log, home, settings or {})
            terminal = terminals[block.terminal]
            terminal.wait()
            terminal.type(typed(block.commands))
            if not block.stays:
                assert terminal.wait() == (0, False), f"block {number}:\n{block.commands}\n{terminal.said}"
            terminal.prints([typed(line) for line in block.prints])
        for terminal in terminals.values():
            assert terminal.wait()[0] == 0, terminal.said
        yield terminals
    finally:
        for terminal in terminals.values():
            terminal.close()


def free_port() -> int:
    """A port that nobody gets while these tests run, but the server that asks for it (`reserve_port`)."""
    _RESERVED.append(reserve_port())
    return int(_RESERVED[-1].getsockname()[1])
