"""A whole run with [train.privacy], as people see it."""

import json
import re

import pytest

from tests.federation.test_private_rounds import private_experiment


@pytest.fixture
def experiment(tmp_path, tiny_checkpoint, calibration):
    return private_experiment(tmp_path, tiny_checkpoint(num_hidden_layers=2), calibration, epsilon=3.0)


def test_a_dry_run_tells_noise_and_cost(cli, experiment):
    code, _, err = cli("run", experiment, "--dry-run", "--tflops", 1)
    assert code == 0
    said = r"numbers: noise σ = ([\d.]+) of the clipped norm, some 4 rows a step; all rounds cost ε = ([\d.]+)"
    found = re.search(said, re.sub(r"\s+", " ", err))
    assert found, err
    assert float(found[1]) > 0.3
    assert 2.99 <= float(found[2]) <= 3.0
    code, out, _ = cli("run", experiment, "--dry-run", "--tflops", 1, "--json")
    told = json.loads(out)["privacy"]
    assert set(told) == {"colours", "numbers"}
    assert told["numbers"]["noise"] == pytest.approx(float(found[1]), abs=1e-3)


def test_a_whole_run_and_its_page_do_without_losses(cli, experiment, tmp_path):
    run = tmp_path / "run"
    code, _, err = cli("run", experiment, "--out", run)
    assert code == 0, err
    assert "Training loss by client and round" not in (run / "report.html").read_text()
    records = json.loads((run / "results.json").read_text())["rounds"]
    assert [client["loss"] for record in records for client in record["clients"].values()] == [None] * 4
    assert cli("report", run)[0] == 0


@pytest.mark.parametrize("how", [["--dry-run"], ["--out", "run"]])
def test_without_the_extra_it_is_told_before_anything_is_done(cli, experiment, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedproxy.privacy.accounting.find_spec", lambda name: None)
    code, _, err = cli("run", experiment, *how)
    assert code == 2
    assert "pip install 'fedproxy[privacy]'" in re.sub(r"\s+", " ", err)
    assert not (tmp_path / "run").exists()
