import io
import json
import sys

import pytest
from rich.console import Console

from fedproxy.cli.comparison_table import comparison_table, differences, table, time_left
from fedproxy.methods import METHODS
from tests.comparison.conftest import experiment_file

__all__ = ["experiment_file"]


def record(method, seed, average, *, tuned=None, megabytes=1.0):
    return {
        "method": method,
        "seed": seed,
        "remove": 0.5,
        "accuracy": {"average": average},
        "proxy_tuned": tuned and {"average": tuned},
        "worst": {"accuracy": average / 2},
        "exposed": 0.75,
        "bytes_up": megabytes * 1e6,
        "bytes_down": 0,
        "proxy_bytes": 0,
        "flops": {"clients": 2e9},
        "seconds": {"federate": 60.0, "compress": None},
    }


def text(keys, cells, width=200):
    shown = table(keys, cells, width)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text()


def test_the_table_fills():
    keys = [(name, seed, 0.5) for seed in (0, 1) for name in ("fedavg", "fedproxy")]
    lines = text(keys, []).splitlines()
    assert [line.split()[1:6:2] for line in lines if "0/2" in line] == [
        ["fedavg", "50%", "0/2"],
        ["fedproxy", "50%", "0/2"],
    ]
    cells = [record("fedavg", 0, 0.5), record("fedavg", 1, 0.7, tuned=0.8, megabytes=2.0)]
    [row] = [line for line in text(keys, cells).splitlines() if "2/2" in line]
    assert [part.strip() for part in row.split("│")[1:-1]] == [
        "fedavg", "50%", "2/2", "0.600 (0.500–0.700)", "0.800", "0.300", "0.750", "1.5", "0", "2", "1"
    ]  # fmt: skip


@pytest.mark.parametrize(("width", "count"), [(80, 5), (120, 9), (200, 11)])
def test_columns_that_do_not_fit_are_left_out_and_none_is_cut(width, count):
    keys = [(name, seed, 0.5) for seed in (0, 1) for name in METHODS]
    cells = [record(name, seed, 0.5 + seed / 10, tuned=0.7) for name, seed, _ in keys]
    lines = text(keys, cells, width).splitlines()
    assert "…" not in "".join(lines)
    assert {len(line.split("│")) - 2 for line in lines if "2/2" in line} == {count}
    assert [line.split()[1] for line in lines if "2/2" in line] == list(METHODS)


@pytest.mark.parametrize(
    ("seconds", "done", "left", "says"),
    [(90.0, 0, 4, ""), (90.0, 3, 4, "about 2 min left"), (121.0, 1, 1, "about 3 min left")],
)
def test_the_time_left_is_that_of_the_cells_so_far(seconds, done, left, says):
    assert time_left(seconds, done, left).strip(" ·") == says


def test_a_cell_that_trains_nothing_says_nothing_of_the_time_left(capsys):
    keys = [("zero-shot", 0, 0.5), ("fedavg", 0, 0.5), ("fedproxy", 0, 0.5)]
    with comparison_table(keys) as (show, done):
        show(keys[0], "evaluate", 0.5, "")
        done({**record("zero-shot", 0, 0.5), "seconds": {"evaluate": 1.0}})
        done(record("fedavg", 0, 0.5))
    first, second = capsys.readouterr().err.splitlines()
    assert "min left" not in first
    assert "min left" in second


@pytest.mark.parametrize(
    ("verdict", "says"),
    [("better", "is better than"), ("worse", "is worse than"), ("undecided", "not told apart from")],
)
def test_better_is_only_said_where_it_was_found(verdict, says):
    row = {"method": "fedproxy", "against": "fedavg", "remove": 0.5, "mean": 0.02, "low": 0.01, "high": 0.03}
    [line] = differences([{**row, "by_seed": [0.02, 0.02], "verdict": verdict}])
    assert says in line
    assert "+0.020 [+0.010, +0.030], 2 seeds" in line


def test_compare_prints_one_json_object_and_no_table_without_a_terminal(cli, tmp_path, experiment_file):
    file = experiment_file('seeds = [0]\nmethods = ["zero-shot", "zero-shot-proxy"]\n', blocks=4)
    code, out, err = cli("compare", file, "--out", tmp_path / "out", "--jobs", 1, "--json")
    assert (code, "accuracy" in err) == (0, False)
    cells = json.loads(out)["cells"]
    assert [cell["method"] for cell in cells] == ["zero-shot", "zero-shot-proxy"]
    for number, cell in enumerate(cells, 1):  # a log shows each cell when it is done
        [line] = [line for line in err.splitlines() if line.startswith(f"{number} of 2 cells")]
        assert f"{cell['method']}, seed 0, " in line
        assert line.endswith(f": {cell['accuracy']['average']:.3f}")
    code, out, err = cli("compare", file, "--out", tmp_path / "out", "--resume")
    assert (code, out) == (0, "")
    assert "zero-shot-proxy" in err
    code, _, err = cli("compare", file, "--out", tmp_path / "out")
    assert (code, "--resume" in err) == (2, True)


def test_compare_writes_a_page_that_report_writes_again(cli, tmp_path, experiment_file, monkeypatch):
    file = experiment_file('seeds = [0]\nmethods = ["zero-shot", "zero-shot-proxy"]\n', blocks=4)
    out, run = tmp_path / "out", tmp_path / "run"
    code, _, err = cli("compare", file, "--out", out, "--jobs", 1)
    assert (code, f"Report:     {out / 'report.html'}" in err) == (0, True)
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    code, printed, _ = cli("report", out, "--json")
    assert (code, json.loads(printed)) == (0, {"reports": [str(out / "report.html")]})
    assert (out / "report.html").read_bytes() == page
    assert cli("report", out / "compare.json", "--out", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").read_bytes() == page
    run.mkdir()
    (run / "results.json").write_text("{}")
    code, _, err = cli("report", run, out)
    assert (code, f"{out} is a comparison of methods" in " ".join(err.split())) == (2, True)
    assert not (run / "report.html").exists()
    (out / "report.html").unlink()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, _, err = cli("compare", file, "--out", out, "--resume")
    assert (code, "No report.html: " in err, (out / "report.html").exists()) == (0, True, False)
    assert cli("report", out)[0] == 2


def test_methods_are_listed(cli):
    code, out, _ = cli("methods", "--json")
    assert code == 0
    assert list(json.loads(out)) == list(METHODS)
    assert json.loads(out)["fedproxy"]["axes"]["merge"] == "h-ties"
    assert all(name in cli("methods")[1] for name in ("fedbiot", "2406.17706"))
