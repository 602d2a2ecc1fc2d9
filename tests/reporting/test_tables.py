import io

import pytest
from rich.console import Console

from fedproxy.errors import ArtifactError
from fedproxy.reporting import results_table, totals_table

from .sample import sample


def rendered(table):
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(table)
    return console.file.getvalue()


def rows(table):
    return [line.replace("│", " ").replace("┃", " ").split() for line in rendered(table).splitlines()]


def test_scores_by_task_and_mean():
    found = rows(results_table(sample()))
    assert ["demo_snips", "11.0", "14.0", "93.0", "89.0", "95.0"] in found
    assert ["Mean", "26.2", "16.0", "87.8", "86.2", "93.0"] in found
    assert ["Task", "LLM", "Proxy", "Tuned", "proxy", "Fused", "LLM", "Centralized"] in found


def test_only_what_was_evaluated_has_a_column():
    raw = sample()
    raw["evaluation"] = {"llm": raw["evaluation"]["llm"]}
    found = rows(results_table(raw))
    assert ["Task", "LLM"] in found
    assert ["Mean", "26.2"] in found


def test_task_names_are_no_markup():
    raw = sample(["a"], tasks=["[red]x[/red]", "[/nonsense]"])
    assert "[red]x[/red]" in rendered(results_table(raw))


def test_totals():
    text = " ".join(rendered(totals_table(sample())).split())
    assert "89.9 % of the way" in text
    assert "26.2 MB up, 52.4 MB down" in text
    assert "compress 3.4 s · federate 2 min 21 s · fuse 0.6 s" in text
    assert "together 3 min 56 s" in text


@pytest.mark.parametrize("table", [results_table, totals_table])
def test_empty_and_broken_results(table):
    rendered(table({}))
    with pytest.raises(ArtifactError):
        table({"evaluation": 3, "cost": []})
