"""Whose run it is that Flower's ServerApp drives: of the process that started it, else its own."""

import contextlib
import subprocess
import sys

import pytest

from fedproxy.deployment.flower import RUN_VARIABLE
from fedproxy.deployment.flower.app import _opened
from fedproxy.errors import UsageError
from fedproxy.pipeline import read_experiment
from fedproxy.run_directory import owned
from tests.test_pipeline import write_experiment


@pytest.fixture
def experiment(tmp_path, tiny_checkpoint, calibration):
    return write_experiment(tmp_path, tiny_checkpoint(), calibration)


def opening(run, experiment=""):
    with _opened(run, experiment) as directory, directory.driven():
        assert directory.path == run


def test_a_serverapp_drives_what_its_owner_began_and_owns_what_has_no_owner(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("fedproxy.run_directory.ENDING_SECONDS", 0.1)
    run = tmp_path / "run"
    opening(run, str(experiment))
    assert (run / "proxy").is_dir()
    opening(run)
    with owned(run, read_experiment(experiment), resume=True, overwrite=False):
        for named in ("", str(experiment)):
            with pytest.raises(UsageError, match="Another process"):
                opening(run, named)
        with monkeypatch.context() as inside:
            inside.setenv(RUN_VARIABLE, str(run))
            opening(run)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_opened(run, ""))
        with pytest.raises(UsageError, match="Another process"):
            opening(run)


def test_to_drive_rounds_takes_neither_peft_nor_transformers(experiment):
    """A ServerApp that begins more than a minute after its task was taken is given up by Flower."""
    script = f"""
import sys
import fedproxy.deployment.flower.app
from fedproxy.config import load_experiment
from fedproxy.federation.tracking import open_tracker
from fedproxy.federation.tuning import tune
load_experiment({str(experiment)!r})
assert not {{"peft", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
