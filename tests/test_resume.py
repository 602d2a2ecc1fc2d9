"""Real signals to a real process: a run that was killed and resumed ends in the bits of one that was not."""

import os
import signal
import subprocess
import sys
import time

import pytest

import fedproxy
from tests.test_pipeline import adapter_bytes, write_experiment

pytestmark = pytest.mark.slow


def start(experiment, out, *flags):
    command = [sys.executable, "-m", "fedproxy", "federate", str(experiment), "--out", str(out), *flags]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it in the background
    )


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def until_round(number, out, process):
    deadline = time.monotonic() + 120
    while not (out / "rounds" / f"{number:04d}").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None


def test_a_kill_loses_nothing(tmp_path, tiny_checkpoint, calibration):
    """One real kill; tests/test_crashes.py has every moment."""
    experiment, out = write_experiment(tmp_path, tiny_checkpoint(), calibration, rounds=12), tmp_path / "killed"
    fedproxy.federate(experiment, tmp_path / "whole")
    process = start(experiment, out)
    until_round(2, out, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 2 <= len(list((out / "rounds").glob("0*"))) < 12
    finish(start(experiment, out, "--resume"))
    assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")
    for path in (tmp_path / "whole" / "rounds").rglob("*.safetensors"):
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "whole")).read_bytes()


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_an_interrupt_is_one_clear_line_and_leaves_complete_rounds(tmp_path, tiny_checkpoint, calibration, sent):
    experiment = write_experiment(tmp_path, tiny_checkpoint(), calibration, rounds=500)
    out = tmp_path / "run"
    process = start(experiment, out)
    until_round(2, out, process)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert (out / "rounds" / "0002" / "round.json").exists()
    assert not list(out.rglob(".*.tmp-*"))
