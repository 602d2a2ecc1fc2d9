"""Starts a command that ends with the process that started it, however that ends.

$ python -m fedproxy.federation.engines.flower.process COMMAND ARGUMENT...
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path | None = None
) -> "subprocess.Popen[bytes]":
    """Start `command`; it is told to end (SIGTERM) when the calling thread or its process ends.

    Args:
        command: Program and arguments; a program without a slash is looked up beside this Python first.
        log: File that its output is appended to.
        environment: Variables that are added to this process's own.
        folder: Its working directory.
    """
    scripts = os.path.dirname(sys.executable)
    path = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    variables = {**os.environ, "PATH": path, **environment}
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=variables,
            cwd=folder,
            start_new_session=True,
        )


def stop(process: "subprocess.Popen[bytes]", patience: float = 5.0) -> None:
    """End a process of `start` and all that it started: SIGTERM first, then SIGKILL."""
    for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, patience)):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                continue
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def tail(log: Path, lines: int = 8) -> str:
    """The last lines of a log, for an error."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])[-2000:]


if __name__ == "__main__":
    parent, program = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
    os.execvp(program[0], program)
