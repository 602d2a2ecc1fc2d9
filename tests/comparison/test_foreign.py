"""A comparison's worker processes find what another package adds."""

import json
import os
import subprocess
import sys

import pytest

from tests.contracts.foreign import FEDERATE, install_others


@pytest.mark.slow
def test_worker_processes_find_choices_of_another_package(tmp_path, experiment_file) -> None:
    settings = ", ".join(f'{key} = "{value}"' for key, value in FEDERATE.items())
    path = experiment_file(
        'seeds = [0]\nmethods = ["fedavg"]\n[[compare.variant]]\nname = "foreign"\nmethod = "fedavg"\n'
        f'federate = {{ {settings} }}\ncompress = {{ score = "last-first" }}\n'
    )
    found = os.pathsep.join([str(install_others(tmp_path / "site")), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "fedproxy", "compare", path, "--out", tmp_path / "out", "--jobs", "2"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": found}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [cell] = (tmp_path / "out" / "cells" / "foreign").rglob("cell.json")
    assert json.loads(cell.read_text())["method"] == "foreign"
