import html as escapes
import json
import re
import sys
import tomllib

import pytest

from fedproxy.errors import ArtifactError, MissingExtraError, UsageError
from fedproxy.methods import METHODS
from fedproxy.reporting import is_comparison, report_comparison

from .html_page import Page, check
from .methods_sample import TASKS, methods_sample, parse

FEW = ("zero-shot", "centralized", "fedavg", "fedproxy")
BROWSER_NAMES = ["<script>alert(1)</script>", "_private $x$", "\"quoted\" & 'so'", "x" * 200, "fedproxy"]


def write(folder, raw):
    (folder / "compare.json").write_text(json.dumps(raw))
    html = report_comparison(folder).read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return write(tmp_path_factory.mktemp("full"), methods_sample())


def test_full_page_is_self_contained_and_accessible(full):
    html, _ = full
    page = check(html)
    federations = 13  # of 14 federated methods, proxy-tuning shares FedAvg's
    shown = 2 + 2 + 3 + 1  # trade-offs, forests, costs, losses
    assert len(page.labels) == shown + 3 * federations + 4 + 1  # and FedProxy's earlier rounds, and its blocks
    assert "fedavg, proxy-tuning · seed 0 · 5 rounds" in page.text


def test_every_method_has_a_row_with_its_means(full):
    _, page = full
    rows = {row.method: row for row in parse(methods_sample()).rows}
    assert list(rows) == list(METHODS)
    for name, row in rows.items():
        mean, low, high = (f"{100 * value:.1f}" for value in (row.accuracy.mean, row.accuracy.low, row.accuracy.high))
        assert f"{name} {mean} ({low}–{high})" in page.text
        tasks = " ".join(f"{100 * row.tasks[task].mean:.1f}" for task in TASKS)
        assert f"{name} {tasks} {mean}" in page.text
    assert "fedavg 63" in page.text
    for title in (
        "Gap closed (%)",
        "Worst client’s task (%)",
        "Tuned proxy (%)",
        "Exposed (%)",
        "FLOP, server",
        "Time",
    ):
        assert title in page.text


def test_every_difference_is_in_a_figure_and_in_the_table(full):
    _, page = full
    text = " ".join(page.labels)
    words = {"better": "better than", "worse": "worse than", "undecided": "not told apart from"}
    for each in methods_sample()["differences"]:
        assert f"{each['method']} {100 * each['mean']:+.1f} ({each['verdict']})" in text
        assert f"{each['method']} {words[each['verdict']]} {each['against']}" in page.text


def test_the_experiment_file_of_the_page_is_the_one_that_was_run(full):
    html, _ = full
    raw = methods_sample()
    written = re.search('aria-label="Experiment file">(.*?)</pre>', html, re.DOTALL)[1]
    assert tomllib.loads(escapes.unescape(written)) == raw["experiment"] | {"compare": raw["compare"]}


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    raw = methods_sample(FEW, seeds=[0], rounds=1)
    assert write(tmp_path, raw)[0] == write(tmp_path, raw)[0]


def test_a_page_needs_no_other_file_and_goes_where_it_is_told(tmp_path):
    (tmp_path / "committed.json").write_text(json.dumps(methods_sample(FEW, seeds=[0], rounds=1)))
    assert is_comparison(tmp_path / "committed.json")
    assert not is_comparison(tmp_path)
    page = report_comparison(tmp_path / "committed.json", tmp_path / "pages" / "all.html")
    assert page == tmp_path / "pages" / "all.html"
    check(page.read_text())
    assert report_comparison(tmp_path / "committed.json") == tmp_path / "report.html"


def test_ratios_have_rows_figures_and_sentences_of_their_own(tmp_path):
    html, page = write(tmp_path, methods_sample(FEW, ratios=(0.25, 0.5), seeds=[0], rounds=2))
    check(html)
    assert "fedproxy 25 " in page.text
    assert "fedproxy 50 " in page.text
    assert "With 25 % removed" in page.text.replace("\u00a0", " ")
    assert any(label.startswith("Difference from fedproxy, 50 % removed") for label in page.labels)
    assert "fedproxy 50 % · seed 0" in page.text
    assert "fedavg 50 % · seed 0" not in page.text


def test_many_rows_name_only_the_front_and_the_methods_that_matter(tmp_path):
    html, _ = write(tmp_path, methods_sample(ratios=(0.25, 0.5), seeds=[0], tasks=["a"], rounds=1))
    drawn = next(svg for svg in html.split("<svg")[1:] if 'id="exposed-title"' in svg).split("</svg>")[0]
    shown = drawn.split("</desc>")[1]
    assert "fedproxy 25 %" in shown
    assert "fedavgm 25 %" not in shown


def test_hostile_names_are_text(tmp_path):
    raw = methods_sample(BROWSER_NAMES, seeds=[0, 1], tasks=BROWSER_NAMES[:3], clients=BROWSER_NAMES[:3], rounds=2)
    raw["name"] = "</title><script>1</script>"
    raw["flops"] = raw["commit"] = "<em>x</em>"
    raw["environment"] = {"<i>": {"<u>": "<style>"}}
    raw["cells"][0]["seconds"] = {"<stage>": 1.0}
    raw["cells"][0]["rounds"][0]["quarantined"] = [{"client": "<b>", "reason": "<img src=x onerror=1>"}]
    raw["methods"]["fedproxy"]["<axis>"] = "</table><script>"
    html, page = write(tmp_path, raw)
    assert not page.tags & {"em", "i", "u", "img", "stage", "axis"}
    assert html.count("<style") == html.count("<script") == 1
    assert all(name in page.text for name in BROWSER_NAMES)


def minimal(raw):
    return {"cells": [{key: cell[key] for key in ("method", "seed", "remove", "accuracy")} for cell in raw["cells"]]}


def earlier(raw):
    """As written before cells kept their rounds."""
    for cell in raw["cells"]:
        cell.pop("rounds", None)
        cell.pop("proxy", None)
    return raw


def alone(raw):
    return raw | {"cells": raw["cells"][:1], "differences": []}


def no_conflict(raw):
    """As of a federation in the space "product"."""
    for cell in raw["cells"]:
        for round_ in cell.get("rounds", []):
            round_["conflict"] = {}
    return raw


@pytest.mark.parametrize("change", [minimal, earlier, alone, no_conflict])
def test_parts_that_are_not_there_leave_a_page(tmp_path, change):
    html, page = write(tmp_path, change(methods_sample(FEW, seeds=[0], rounds=1)))
    check(html)
    assert ("No rounds were recorded" in page.text) == (change is not no_conflict)


@pytest.mark.parametrize("value", [1e30, -1e30, 0])
def test_numbers_at_the_limits_are_drawn(tmp_path, value):
    raw = methods_sample(("centralized", "fedproxy"), seeds=[0], tasks=["a"], clients=["x", "y"], rounds=2)

    bounded = ("seed", "round", "similarity", "conflict")

    def everywhere(part):
        if isinstance(part, dict):
            return {key: each if key in bounded else everywhere(each) for key, each in part.items()}
        if isinstance(part, list):
            return [everywhere(each) for each in part]
        return value if isinstance(part, int | float) else part

    raw["cells"] = everywhere(raw["cells"])
    write(tmp_path, raw)


def test_a_damaged_file_leaves_no_page(tmp_path):
    with pytest.raises(ArtifactError, match="compare"):
        report_comparison(tmp_path)
    (tmp_path / "compare.json").write_text('{"cells": [{}]}')
    with pytest.raises(ArtifactError, match="cells"):
        report_comparison(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "compare.json").write_text(json.dumps(methods_sample(FEW[:1], seeds=[0], tasks=["a"])))
    with pytest.raises(UsageError):
        report_comparison(tmp_path, tmp_path / "compare.json" / "page.html")


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_missing_extra_is_named_and_leaves_no_page(tmp_path, monkeypatch, module):
    (tmp_path / "compare.json").write_text(json.dumps(methods_sample(FEW, seeds=[0], rounds=1)))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"fedproxy\[report\]"):
        report_comparison(tmp_path)
    assert not (tmp_path / "report.html").exists()
