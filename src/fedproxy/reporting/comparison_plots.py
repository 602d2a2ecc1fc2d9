"""The figures that put runs side by side. Call them inside `svg.drawing()`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedproxy.reporting.plots import score_axis, whole_rounds
from fedproxy.reporting.results import Results
from fedproxy.reporting.svg import COLOURS, INK, MARKERS, figure, inline, label, legend_text

Runs = Mapping[str, Results]
"""Results by the run's label."""


def task_scores(runs: Runs) -> str:
    """Score of every run's fused LLM on each task, and the mean."""
    scored = {name: run.evaluation["fused"] for name, run in runs.items() if "fused" in run.evaluation}
    tasks = list(dict.fromkeys(task for each in scored.values() for task in each.tasks))
    names = [*tasks, "Mean"]
    drawn, axes = figure(
        4.6,
        1.1 + (0.3 + 0.04 * len(scored)) * len(names) + 0.17 * math.ceil(len(scored) / 2),
        "Fused LLM: score by task",
    )
    for index, each in enumerate(scored.values()):
        values = [each.tasks.get(task) for task in tasks] + [each.average]
        shift = 0.6 * ((index + 0.5) / len(scored) - 0.5)  # marks of one task must not hide each other
        points = [(100 * value, row + shift) for row, value in enumerate(values) if value is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], linestyle="none", markersize=6, **_mark(index))
    score_axis(axes, names)
    drawn.legend(axes.get_lines(), [legend_text(name) for name in scored], loc="outside lower center", ncols=2)
    means = ", ".join(f"{label(name)} {100 * (each.average or 0):.1f} %" for name, each in scored.items())
    return inline(drawn, "task-scores", f"Points, a row a task; numbers in the table. Means: {means}.")


def trade_off(values: Mapping[str, tuple[float, float]], *, name: str, title: str, axis: str) -> str:
    """Mean score of the fused LLM against a cost, a point a run; a line joins the runs that no other one betters.

    Args:
        values: Run's label → its cost and its score, a share of 1.
        name: Unique in the page.
        title: Of the figure.
        axis: What the cost is, with its unit.
    """
    drawn, axes = figure(4.6, 2.9 + 0.17 * math.ceil(len(values) / 2), title)
    lines = [
        axes.plot([cost], [100 * score], linestyle="none", markersize=8, **_mark(index))[0]
        for index, (cost, score) in enumerate(values.values())
    ]
    best = front(list(values.values()))
    axes.plot([cost for cost, _ in best], [100 * score for _, score in best], color=INK, linewidth=0.8, zorder=1)
    axes.set_xlabel(axis)
    axes.set_ylabel("mean score (%)")
    axes.margins(0.12)
    axes.set_xlim(left=0)
    axes.grid(axis="both")
    drawn.legend(lines, [legend_text(each) for each in values], loc="outside lower center", ncols=2)
    text = ", ".join(f"{label(each)} {100 * score:.1f} % at {cost:.3g}" for each, (cost, score) in values.items())
    return inline(drawn, name, f"Points, a run each; cost in {axis}: {text}.")


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, score) that no other point is at least as good as in both, by rising cost.

    Example:
        >>> front([(2.0, 0.5), (1.0, 0.4), (3.0, 0.45)])
        [(1.0, 0.4), (2.0, 0.5)]
    """
    found: list[tuple[float, float]] = []
    for cost, score in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not found or score > found[-1][1]:
            found.append((cost, score))
    return found


def mean_losses(runs: Runs) -> str:
    """Mean training loss of the clients of each run, by round."""
    drawn, axes = figure(4.6, 2.9 + 0.17 * math.ceil(len(runs) / 2), "Training loss by round, mean of the clients")
    lines = []
    for run in runs.values():
        means = {
            round_.number: sum(losses) / len(losses)
            for round_ in run.rounds
            if (losses := [client.loss for client in round_.clients if client.loss is not None])
        }
        lines.append(means)
        axes.plot(list(means), list(means.values()), linewidth=1.8, markersize=5, **_mark(len(lines) - 1))
    whole_rounds(axes, sorted({number for means in lines for number in means}))
    axes.set_ylim(0, 1.08 * max(loss for means in lines for loss in means.values()) or 1)
    axes.set_ylabel("loss (nats a token)")
    axes.grid(axis="y")
    drawn.legend(axes.get_lines(), [legend_text(name) for name in runs], loc="outside lower center", ncols=2)
    return inline(drawn, "mean-losses", "Lines, a run each; every client counts the same.")


def _mark(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
