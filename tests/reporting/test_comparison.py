import json
from pathlib import Path

import pytest

from fedproxy.errors import ArtifactError, UsageError
from fedproxy.reporting import compare_runs
from fedproxy.reporting.comparison import differences, labels, sentences, worst_change
from fedproxy.reporting.hindrances import hindrances
from fedproxy.reporting.plots import front

from .html_page import check
from .sample import parse, sample


def runs(folder, *changes):
    folders = []
    for index, change in enumerate(changes):
        raw = sample(rounds=2)
        change(raw)
        folders.append(folder / f"run{index}")
        folders[-1].mkdir(parents=True)
        (folders[-1] / "results.json").write_text(json.dumps(raw))
    return folders


def same(raw):
    pass


def smaller(raw):
    raw["seed"] = raw["experiment"]["seed"] = 1
    raw["proxy"]["parameters"] = 1_000_000
    raw["evaluation"]["fused"]["average"] = 0.5
    raw["experiment"]["federate"]["merge"] = "mean"
    del raw["experiment"]["federate"]["quorum"]


def other_test(raw):
    raw["llm"]["sha256"] = "cd" * 32
    for scored in raw["evaluation"].values():
        scored["tasks"]["demo_snips"]["n"] = 10


def no_scores(raw):
    raw["evaluation"] = {}


def test_runs_stand_side_by_side(tmp_path):
    folders = runs(tmp_path, same, smaller)
    html = compare_runs(folders, tmp_path / "pages" / "all.html").read_text()
    page = check(html)
    assert [link for link in page.links if link[0] != "#"] == ["../run0/report.html", "../run1/report.html"]
    assert (
        "Of 2 runs, the fused LLM of run0 has the highest mean, 86.2 %, and that of run1 the lowest, 50.0 %"
        in page.text
    )
    assert "run1 1 mean 26.2 16.0 87.8 50.0 93.0" in page.text
    assert "demo_snips 89.0 89.0" in page.text
    assert "[federate] merge h-ties mean" in page.text
    assert "[federate] quorum 0.75 –" in page.text
    assert "same seed" not in page.text
    assert len(page.labels) == 4


def lost_by_plugging_in(raw):
    raw["evaluation"]["fused"] = raw["evaluation"]["llm"]


def all_reached(raw):
    raw["evaluation"]["fused"] = raw["evaluation"]["centralized"]
    raw["gap_closed"] = 1.0


def test_what_holds_a_run_back_is_said_of_that_run_alone(tmp_path):
    page = check(compare_runs(runs(tmp_path, all_reached, lost_by_plugging_in), tmp_path / "all.html").read_text())
    found = parse(json.loads((tmp_path / "run1" / "results.json").read_text()))
    assert [one.kind for one in hindrances(found)]
    section = page.text.split("What holds them back")[-1].split("Settings")[0]
    assert all(one.advice in section for one in hindrances(found))
    assert "run1" in section
    assert "run0" not in section
    page = check(compare_runs(runs(tmp_path / "b", all_reached, all_reached), tmp_path / "b.html").read_text())
    assert "What holds them back" not in page.text


@pytest.mark.parametrize("changes", [(no_scores, no_scores), (same, no_scores)])
def test_runs_without_scores_leave_a_page(tmp_path, changes):
    check(compare_runs(runs(tmp_path, *changes), tmp_path / "all.html").read_text())


def test_names_are_text_and_links_are_quoted(tmp_path):
    folders = [
        folder.rename(tmp_path / name)
        for folder, name in zip(runs(tmp_path, same, same), ("<b>x", "a #1"), strict=True)
    ]
    page = check(compare_runs(folders, tmp_path / "all.html").read_text())
    assert "<b>x" in page.text
    assert "a%20%231/report.html" in page.links


def test_what_stands_against_a_comparison_is_said():
    def said(change):
        first, second = sample(), sample()
        change(second)
        return " ".join(sentences({"a": parse(first), "b": parse(second)}))

    assert "differ in the LLM and the number of rows scored: their scores are not those of one test." in said(
        other_test
    )
    assert "differ" not in said(same)
    assert "All runs have the same seed" in said(same)
    assert "same seed" not in said(smaller)


def test_worst_change_by_hand():
    raw = sample()
    raw["evaluation"]["fused"]["tasks"]["demo_travel"]["acc"] = 0.30
    assert worst_change(parse(raw)) == pytest.approx(-0.04)
    del raw["evaluation"]["llm"]
    assert worst_change(parse(raw)) is None


def test_equal_settings_are_no_difference():
    assert differences({"a": parse(sample()), "b": parse(sample())}) == {}


def test_labels_are_the_shortest_ends_that_differ():
    assert labels([Path("x/first"), Path("y/second")]) == ["first", "second"]
    assert labels([Path("x/run"), Path("y/run")]) == ["x/run", "y/run"]


def test_front_by_hand():
    assert front([(2.0, 0.5), (1.0, 0.4), (3.0, 0.45), (2.0, 0.3), (4.0, 0.5)]) == [(1.0, 0.4), (2.0, 0.5)]


def test_only_a_page_is_replaced(tmp_path):
    folders = runs(tmp_path, same, smaller)
    before = (folders[0] / "results.json").read_bytes()
    with pytest.raises(UsageError, match=r"results.json exists and is no page of fedproxy"):
        compare_runs(folders, folders[0] / "results.json")
    assert (folders[0] / "results.json").read_bytes() == before
    (tmp_path / "all.html").touch()
    first = compare_runs(folders, tmp_path / "all.html").read_bytes()
    assert compare_runs(folders, tmp_path / "all.html").read_bytes() == first


def test_impossible_comparisons(tmp_path):
    folders = runs(tmp_path, same)
    with pytest.raises(UsageError, match="two runs or more, got 1"):
        compare_runs(folders, tmp_path / "all.html")
    with pytest.raises(UsageError, match="given twice"):
        compare_runs([folders[0], tmp_path / "." / "run0"], tmp_path / "all.html")
    with pytest.raises(ArtifactError, match=r"results\.json is missing"):
        compare_runs([folders[0], tmp_path / "nowhere"], tmp_path / "all.html")
    assert not (tmp_path / "all.html").exists()
