"""Whole runs with secure sums in one process, with a tiny model."""

import json
import shutil

import pytest
import torch

import fedproxy
from fedproxy.tensor_files import load_tensors
from tests.test_pipeline import write_experiment


@pytest.fixture
def experiment(tmp_path, tiny_checkpoint, calibration):
    """A function that writes an experiment of three clients, whose steps are not rounded to 16 bits."""

    def write(extra: str):
        path = write_experiment(tmp_path, tiny_checkpoint(), calibration, extra=extra, rounds=2)
        rows = [{"prompt": f"say fruit {i}:", "completion": " plum"} for i in range(12)]
        (tmp_path / "fruits.jsonl").write_text("\n".join(map(json.dumps, rows)))
        text = path.read_text().replace("[train]\n", '[train]\nprecision = "fp32"\n')
        path.write_text(text + '\n[[client]]\nname = "fruits"\ndata = "fruits.jsonl"\n')
        return path

    return write


def adapter(run):
    return load_tensors(run / "adapter" / "adapter_model.safetensors")


def far(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_the_mean_is_that_of_a_plain_run(experiment, tmp_path):
    fedproxy.federate(experiment('merge = "mean"\n'), tmp_path / "plain")
    found = fedproxy.federate(experiment('merge = "mean"\nsecure = true\n'), tmp_path / "secure")
    assert [sorted(record["clients"]) for record in found.rounds] == [["colours", "fruits", "numbers"]] * 2
    assert far(adapter(tmp_path / "plain"), adapter(tmp_path / "secure")) < 1e-3  # two rounds, Adam, PCR
    first = [load_tensors(tmp_path / run / "rounds/0001/adapter.safetensors") for run in ("plain", "secure")]
    assert 0 < far(*first) < 3e-6
    conflict = [load_tensors(tmp_path / run / "rounds/0001/conflict.safetensors") for run in ("plain", "secure")]
    assert all(torch.equal(conflict[0][name], conflict[1][name]) for name in conflict[0])


def test_a_killed_run_goes_on(experiment, tmp_path):
    """What a kill after round 1 leaves is resumed by clients with other keys, which remember their agreement."""
    path = experiment("secure = true\n")
    whole = fedproxy.federate(path, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "adapter")
    shutil.rmtree(tmp_path / "killed" / "rounds" / "0002")
    resumed = fedproxy.federate(path, tmp_path / "killed", resume=True)
    assert torch.equal(*(next(iter(load_tensors(tmp_path / run / "rounds/0001/adapter.safetensors").values()))
                         for run in ("whole", "killed")))  # fmt: skip
    for key in ("weights", "agreement", "contested"):
        one, other = (found.rounds[1]["analysis"][key] for found in (whole, resumed))
        assert one == pytest.approx(other, abs=1e-4)
    assert far(adapter(tmp_path / "whole"), adapter(tmp_path / "killed")) < 1e-4
