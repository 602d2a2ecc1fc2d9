"""The guide as a reader follows it: every block is typed into the terminal it names, and prints what the page says."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedproxy.cli import main

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = DOCS / "deployment.md"
PATIENCE = 400.0
_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TERMINAL = re.compile(r"# ((\w+)(?:'s second terminal)?)(: leave it running)?\n")


@dataclass
class Block:
    """Commands, and lines that they print; "…" stands for what is not always the same."""

    terminal: str
    folder: str
    stays: bool
    commands: str
    prints: list[str] = field(default_factory=list)


def blocks() -> list[Block]:
    found: list[Block] = []
    for language, text in _FENCED.findall(GUIDE.read_text()):
        if language == "sh":
            head = _TERMINAL.match(text)
            assert head is not None, f"whose terminal is this?\n{text}"
            folder = "." if head[2] == "here" else head[2]
            found.append(Block(head[1], folder, head[3] is not None, text[head.end() :]))
        elif language == "text":
            found[-1].prints += text.splitlines()
    return found


class Terminal:
    """A shell in a folder, into which commands are typed once the ones before have ended."""

    def __init__(self, folder: Path, log: Path, home: Path) -> None:
        scripts = os.path.dirname(sys.executable)
        environment = {key: value for key, value in os.environ.items() if key not in ("XDG_CACHE_HOME", "FLWR_HOME")}
        environment |= {
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "COLUMNS": "160",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_guide_works_as_written(tmp_path):
    port = str(free_port())
    terminals: dict[str, Terminal] = {}
    try:
        for number, block in enumerate(blocks()):
            if block.terminal not in terminals:
                log = tmp_path / f"{block.terminal}.log"
                terminals[block.terminal] = Terminal(tmp_path / block.folder, log, tmp_path)
            terminal = terminals[block.terminal]
            terminal.wait()
            terminal.type(block.commands.replace("9443", port))
            if not block.stays:
                assert terminal.wait() == (0, False), f"block {number}:\n{block.commands}\n{terminal.said}"
            terminal.prints([line.replace("9443", port) for line in block.prints])
        for terminal in terminals.values():
            assert terminal.wait()[0] == 0, terminal.said
        scores = [float(score) for score in re.findall(r"average\D*(0\.\d+)", terminals["owner"].said)]
        assert len(scores) == 2, terminals["owner"].said
        assert scores[1] > scores[0] + 0.2
    finally:
        for terminal in terminals.values():
            terminal.close()


COMMAND = re.compile(r"fedproxy (keys \w+|serve|join|federate|fuse|evaluate|run)\b([^\n`|]*)")


@pytest.mark.parametrize("page", ["deployment.md", "threat_model.md"])
def test_every_option_on_the_page_exists(page, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for command, rest in COMMAND.findall((DOCS / page).read_text()):
        with pytest.raises(SystemExit) as end:
            main([*command.split(), "--help"])
        assert end.value.code == 0, command
        known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
        assert set(re.findall(r"(?<!\S)--[a-z][a-z-]+", rest)) <= known, command


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_and_paths_lead_somewhere(page):
    text = (DOCS / page).read_text()
    headings = {_anchor(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        assert not file or (DOCS / file).exists(), target
        assert not heading or file or heading in headings, target
    for path in re.findall(r"`((?:tests|src|docs|benchmarks|scripts)/[\w./-]+)", text):
        assert (DOCS.parent / path).exists(), path


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def test_tests_that_pages_name_exist():
    for page in DOCS.glob("*.md"):
        for path, name in re.findall(r"`(tests/[\w./-]+\.py)::(\w+)`", page.read_text()):
            assert f"def {name}(" in (DOCS.parent / path).read_text(), f"{page.name}: {path}::{name}"
