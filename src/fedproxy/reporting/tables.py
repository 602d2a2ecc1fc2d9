"""The run's results as terminal tables."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from fedproxy.records import MODELS, Results
from fedproxy.reporting import validation
from fedproxy.reporting.hindrances import hindrances
from fedproxy.reporting.units import decimals, duration, percent, size
from fedproxy.typed_json import as_record


def results_table(results: Mapping[str, Any]) -> Table:
    """Score of every model on every task, in per cent, and their means.

    Args:
        results: What results.json holds.

    Raises:
        ArtifactError: a part has the wrong type.
    """
    parsed = as_record(dict(results), Results, "results")
    table = Table(title="Score in %", title_justify="left")
    table.add_column("Task", overflow="fold")
    for model in parsed.evaluation:
        table.add_column(MODELS[model], justify="right", style="bold" if model == "fused" else "")
    for task in parsed.tasks:
        scores = (percent(scored.tasks.get(task)) for scored in parsed.evaluation.values())
        table.add_row(Text(task), *scores, end_section=task == parsed.tasks[-1])
    if parsed.left_out:
        table.caption = Text(f"Not a score in %, and in no mean: {', '.join(parsed.left_out)}")
    if parsed.tasks:
        table.add_row("Mean", *(percent(scored.average) for scored in parsed.evaluation.values()), style="bold")
    return table


def validation_table(results: Mapping[str, Any]) -> Table | None:
    """What is reached on rows that clients keep back, in the round that is kept and by the LLM; none if nobody scored.

    Args:
        results: What results.json holds.

    Raises:
        ArtifactError: a part has the wrong type.
    """
    parsed = as_record(dict(results), Results, "results")
    kept, reached = parsed.kept, validation.reached(parsed)
    if kept is None or not reached:
        return None
    table = Table(title=f"On rows that the clients kept back, round {kept.number}, which is kept", title_justify="left")
    table.add_column("Model", overflow="fold")
    for column in ("Loss", "Accuracy, %", "Worst client", "Its loss"):
        table.add_column(column, justify="left" if column == "Worst client" else "right", overflow="fold")
    for model, found in reached.items():
        means = (decimals(found.loss.by_rows), percent(found.accuracy.by_rows))
        table.add_row(model, *means, Text(found.worst.client), decimals(found.worst.loss))
    table.caption = Text(f"Means by rows. {_best(parsed)}".rstrip())
    table.caption_justify = "left"
    return table


def hindrances_table(results: Mapping[str, Any]) -> Table | None:
    """What holds the result back, and what to try next; none if nothing is known to.

    Args:
        results: What results.json holds.

    Raises:
        ArtifactError: a part has the wrong type.
    """
    found = hindrances(as_record(dict(results), Results, "results"))
    if not found:
        return None
    table = Table(title="What holds the result back", title_justify="left", show_lines=True)
    for column in ("Kind", "What the figures say", "What to try next"):
        table.add_column(column, overflow="fold")
    for one in found:
        table.add_row(one.kind, Text(one.found), Text(one.advice))
    return table


def _best(results: Results) -> str:
    """Which round was the best and whether it was waited for no longer, where more than one was scored."""
    last = results.rounds[-1].validation
    if last.best_round is None or len(results.rounds) == 1:
        return ""
    ended = ", so the federation ended early" * last.stop
    return f"Of {len(results.rounds)} rounds the best is round {last.best_round}{ended}."


def totals_table(results: Mapping[str, Any]) -> Table:
    """Gap closed, bytes sent, memory and seconds of each stage; only what the run recorded.

    Args:
        results: What results.json holds.

    Raises:
        ArtifactError: a part has the wrong type.
    """
    parsed = as_record(dict(results), Results, "results")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    if parsed.gap_closed is not None:
        table.add_row("Gap closed", f"{percent(parsed.gap_closed)} % of the way from LLM to centralized")
    cost = parsed.cost
    if cost.bytes_up is not None and cost.bytes_down is not None:
        table.add_row("Bytes sent", f"{size(cost.bytes_up)} up, {size(cost.bytes_down)} down, all clients and rounds")
    if cost.peak_memory is not None:
        table.add_row("Peak memory", size(cost.peak_memory))
    if cost.seconds:
        stages = " · ".join(f"{stage} {duration(value)}" for stage, value in cost.seconds.items())
        table.add_row("Time", Text(f"{stages} · together {duration(sum(cost.seconds.values()))}"))
    return table
