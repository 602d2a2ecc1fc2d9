"""Run commands on damaged artifacts within little more memory than a healthy command needs.

    python -m tests.hostile.limited MIB SECONDS DIRECTORY...

Each directory holds `command.json`, a list of arguments. The first directory is whole: its command warms up. Then the
address space is limited to what is in use plus MIB, and each other command may take SECONDS. Prints a line of JSON for
each: the directory, the exit code, what was said on stderr, the seconds.
"""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from fedproxy.cli import main


def run(directory: Path) -> tuple[int, str]:
    """Run the command of `directory` in it; the exit code and what it said."""
    os.chdir(directory)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main(json.loads(Path("command.json").read_text()))
        except SystemExit as end:
            return int(str(end.code)), said.getvalue()
    raise AssertionError("main ends with an exit code")


def stop(number: int, frame: FrameType | None) -> None:
    """End a command that takes too long, with a code that is none of a refusal."""
    raise KeyboardInterrupt


def in_use() -> int:
    """Bytes of address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    spare, seconds = int(sys.argv[1]) << 20, int(sys.argv[2])
    healthy, *damaged = map(Path, sys.argv[3:])
    code, text = run(healthy)
    assert code == 0, text
    resource.setrlimit(resource.RLIMIT_AS, (in_use() + spare,) * 2)
    signal.signal(signal.SIGALRM, stop)
    for place in damaged:
        began = time.perf_counter()
        signal.alarm(seconds)
        code, text = run(place)
        signal.alarm(0)
        sys.stdout.write(json.dumps([place.name, code, text, time.perf_counter() - began]) + "\n")
        sys.stdout.flush()
