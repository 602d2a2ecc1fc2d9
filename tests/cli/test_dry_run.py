import json

import pytest

from tests.comparison.conftest import experiment_file

__all__ = ["experiment_file"]

COMPARE = 'methods = ["zero-shot", "fedavg"]\nseeds = [0]'


def test_a_run_is_shown_and_nothing_is_written(cli, experiment_file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = experiment_file(COMPARE)
    before = set(path.parent.rglob("*"))
    code, out, err = cli("run", path, "--dry-run", "--out", tmp_path / "out", "--tflops", 2)
    assert (code, out) == (0, "")
    for words in ("Proxy: 6 blocks", "colour-owner", "shape-owner", "'colour of thing", "→ ' red</s>'", "as given"):
        assert words in err
    assert "divided by 2 TFLOP/s" in err
    assert "Nothing was written, and no weight was read." in err
    assert set(path.parent.rglob("*")) == before
    assert not list(tmp_path.iterdir())


def test_what_scoring_takes_is_shown_where_clients_score(cli, experiment_file):
    path = experiment_file(COMPARE)
    _, _, without = cli("run", path, "--dry-run", "--tflops", 1)
    path.write_text(path.read_text().replace("[federate]", "[federate]\nvalidation = 0.5"))
    code, _, err = cli("run", path, "--dry-run", "--tflops", 1)
    assert code == 0
    for words in ("keeps so many back", "colour-owner 3, shape-owner 3", "score adapters, and train alone if asked"):
        assert words in " ".join(err.split())
        assert words not in " ".join(without.split())


def test_as_json(cli, experiment_file):
    path = experiment_file(COMPARE)
    code, out, _ = cli("run", path, "--dry-run", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["clients"]["colour-owner"]["example"]["prompt"].startswith("colour of thing")
    assert "a product of" in found["speed"]["source"]
    code, out, _ = cli("compare", path, "--dry-run", "--json", "--tflops", 1)
    assert code == 0
    assert [cell["method"] for cell in json.loads(out)["cells"]] == ["zero-shot", "fedavg"]


def test_a_comparison_is_shown(cli, experiment_file):
    code, out, err = cli("compare", experiment_file(COMPARE), "--dry-run", "--tflops", 1)
    assert (code, out) == (0, "")
    assert [line.split()[0] for line in err.splitlines() if "25%" in line] == ["zero-shot", "fedavg"]
    assert "All 2 cells" in err


@pytest.mark.parametrize("command", ["run", "compare"])
@pytest.mark.parametrize(
    ("old", "new", "code", "message"),
    [
        ('task = "colour"', 'task = "colours"', 2, "unknown task 'colours'"),
        ("calibration = ", "# ", 2, "calibration"),
        ("rounds = 2", "rounds = 0", 2, "rounds = 0: must be greater than 0"),
        ('path = "', 'path = "nobody/', 3, "is no checkpoint"),
    ],
)
def test_errors(cli, experiment_file, command, old, new, code, message):
    path = experiment_file(COMPARE)
    path.write_text(path.read_text().replace(old, new, 1))
    found, out, err = cli(command, path, "--dry-run", "--tflops", 1)
    assert (found, out) == (code, "")
    assert message in err
    assert "bug" not in err


@pytest.mark.parametrize("command", ["run", "compare"])
def test_without_a_dry_run_a_directory_is_needed(cli, experiment_file, command):
    code, _, err = cli(command, experiment_file(COMPARE))
    assert code == 2
    assert "--out" in err
    assert cli(command, experiment_file(COMPARE), "--dry-run", "--tflops", 0)[0] == 2
