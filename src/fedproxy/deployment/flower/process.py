"""Runs a command of which nothing is left once it ends, or the process that wanted it does, however that is.

Flower's processes start others, partly in sessions of their own, and leave it to those to notice when they are alone,
which some never do. Here a keeper stands between: whatever loses its parent becomes its child
(PR_SET_CHILD_SUBREAPER), so it can end all of them.

$ python -P -m fedproxy.deployment.flower.process PARENT COMMAND ARGUMENT...
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedproxy.foreign import plain

GRACE_SECONDS = 5.0
"""What a command that was told to end may take for it."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path | None = None
) -> "subprocess.Popen[bytes]":
    """Start `command`; it is told to end (SIGTERM) when the calling thread or its process ends.

    Args:
        command: Program and arguments.
        log: File that its output is appended to.
        environment: Variables that are added to this process's own.
        folder: Its working directory.

    Returns:
        Its keeper, which ends with its exit code.
    """
    variables = {**os.environ, **environment}
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=variables,
            cwd=folder,
            start_new_session=True,
        )


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process of `start` and all that it started: SIGTERM first, then SIGKILL."""
    process.terminate()
    process.wait()


def tail(log: Path, lines: int = 8) -> str:
    """The last lines of a log, for an error; others may have had a part in it."""
    try:
        text = _COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return plain("\n".join([line for line in text.splitlines() if line.strip()][-lines:])[-2000:], lines=True)


def keep(parent: int, command: Sequence[str]) -> int:
    """Run `command` until it or the process `parent` ends, then end all that it left.

    Returns:
        Its exit code.
    """
    watched = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    system = ctypes.CDLL(None)
    system.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    system.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return 1
    child = os.fork()
    if child == 0:
        system.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        os.execvp(command[0], list(command))
    code, until = None, None
    while (code := _reaped(child)) is None:
        if until is None:
            if signal.sigwait(watched) != signal.SIGCHLD:
                until = time.monotonic() + GRACE_SECONDS
                os.kill(child, signal.SIGTERM)
        elif signal.sigtimedwait(watched, max(0.0, until - time.monotonic())) is None:
            break
    while True:
        for orphan in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return 1 if code is None else code


def _reaped(child: int) -> int | None:
    """Take leave of processes that ended; the exit code of `child` once it is among them."""
    while True:
        with contextlib.suppress(ChildProcessError):
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            if ended:
                continue
        return None


def _children() -> list[int]:
    """The processes whose parent is this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2:]))
