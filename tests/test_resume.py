"""Real kills of real processes: a run that was killed and resumed ends in the bits of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

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


def test_kills_at_random_moments_lose_nothing(tmp_path, tiny_checkpoint, calibration):
    experiment = write_experiment(tmp_path, tiny_checkpoint(), calibration, rounds=12)
    began = time.monotonic()
    finish(start(experiment, tmp_path / "whole"))
    whole = time.monotonic() - began
    generator = random.Random(0)
    out, complete = tmp_path / "killed", 0
    for _ in range(5):
        process = start(experiment, out, "--resume")
        try:
            process.wait(timeout=generator.uniform(0.4, 1.0) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        rounds = len(list((out / "rounds").glob("0*"))) if (out / "rounds").exists() else 0
        assert rounds >= complete
        complete = rounds
    finish(start(experiment, out, "--resume"))
    assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")
    for path in (tmp_path / "whole" / "rounds").rglob("*.safetensors"):
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "whole")).read_bytes()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_an_interrupt_is_one_clear_line_and_leaves_complete_rounds(tmp_path, tiny_checkpoint, calibration, sent, code):
    experiment = write_experiment(tmp_path, tiny_checkpoint(), calibration, rounds=500)
    out = tmp_path / "run"
    process = start(experiment, out)
    deadline = time.monotonic() + 120
    while not (out / "rounds" / "0002").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert (out / "rounds" / "0002" / "round.json").exists()
    assert not list(out.rglob(".*.tmp-*"))
