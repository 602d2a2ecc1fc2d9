import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedproxy.deployment.flower.process import start, stop, tail

FAMILY = """
import subprocess, sys, time
for _ in range(2):
    subprocess.Popen([sys.executable, "-c", {inner!r}], start_new_session=True)
"""
INNER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
PARENT = FAMILY.format(inner=INNER) + "time.sleep(60)"


def eventually(holds, seconds=10.0):
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return holds()


def marked(mark):
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"MARK={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.fixture
def family(tmp_path):
    """A command with two children in sessions of their own that ignore SIGTERM: keeper, mark and command's id."""
    mark, log = str(tmp_path), tmp_path / "log"
    keeper = start([sys.executable, "-c", PARENT], log, {"MARK": mark})
    assert eventually(lambda: log.read_text().count("up") == 2), log.read_text()
    assert len(marked(mark)) == 4
    command = next(pid for pid in marked(mark) if Path(f"/proc/{pid}/stat").read_text().split()[3] == str(keeper.pid))
    yield keeper, mark, command
    stop(keeper)


def test_stop_ends_all_of_it(family):
    keeper, mark, _ = family
    stop(keeper)
    assert not marked(mark)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_command_leaves_is_ended(family, number):
    keeper, mark, command = family
    os.kill(command, number)
    assert keeper.wait(10) == 128 + number
    assert not marked(mark)


def test_it_ends_with_the_process_that_wanted_it(tmp_path):
    log, mark = tmp_path / "log", str(tmp_path)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom fedproxy.deployment.flower.process import start\n"
        f"start([sys.executable, '-c', {PARENT!r}], Path({str(log)!r}), {{'MARK': {mark!r}}})\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as wanting:
        assert eventually(lambda: log.is_file() and log.read_text().count("up") == 2)
        wanting.kill()
    assert eventually(lambda: not marked(mark))


@pytest.mark.parametrize("code", [0, 7])
def test_the_exit_code_is_the_commands(tmp_path, code):
    keeper = start([sys.executable, "-c", f"print('said'); raise SystemExit({code})"], tmp_path / "log", {})
    assert keeper.wait(10) == code
    assert tail(tmp_path / "log") == "said"


def test_a_command_that_is_missing_is_an_exit_code(tmp_path):
    keeper = start(["no-such-command-here"], tmp_path / "log", {})
    assert keeper.wait(10) == 1
    assert "no-such-command-here" in (tmp_path / "log").read_text() or "FileNotFoundError" in tail(tmp_path / "log")
