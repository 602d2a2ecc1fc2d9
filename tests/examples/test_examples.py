"""The examples as a user runs them: each is a program of its own, and says something that can be checked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedproxy
from tests.docs.terminal import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_LINES = 60


def example(*command: object) -> str:
    """What an example prints, run in a process of its own without a network."""
    paths = [str(Path(fedproxy.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PORT": str(free_port()),
    }
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_is_short_and_run_here() -> None:
    found = {path.name: path.read_text() for path in EXAMPLES.iterdir() if path.is_file()}
    assert found.keys() == {"in_memory.py", "own_rule.py", "loopback.sh", "round_analysis.py"}
    assert all(text.count("\n") < MOST_LINES for text in found.values())


def test_a_rule_of_ones_own_resists_a_client_that_lies() -> None:
    said = example(sys.executable, EXAMPLES / "own_rule.py")
    errors = {name: float(error) for name, error in re.findall(r"(.+): relative error (\S+)", said)}
    assert errors["nearest"] < 0.3 < errors["mean"]


@pytest.mark.slow
def test_the_whole_method_in_memory() -> None:
    said = example(sys.executable, EXAMPLES / "in_memory.py")
    first, second = (float(loss) for loss in re.findall(r"loss bank (\S+),", said))
    assert second < first
    answers = dict(re.findall(r"(before|after): '(.*)'", said))
    assert "plug" in answers["after"]
    assert "plug" not in answers["before"]


@pytest.mark.slow
def test_three_processes_and_what_their_rounds_say(tmp_path: Path) -> None:
    example("sh", EXAMPLES / "loopback.sh", tmp_path)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "Round 2 ·" in (tmp_path / "run" / "report.html").read_text()
    said = example(sys.executable, EXAMPLES / "round_analysis.py", tmp_path / "run")
    losses = [float(loss) for loss in re.findall(r"bank +48 +(\S+)", said)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert "similarity in round 2" in said
