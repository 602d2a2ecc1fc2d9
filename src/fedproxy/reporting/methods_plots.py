"""The figures of a comparison of methods. Call them inside `svg.drawing()`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedproxy.methods import CENTRALIZED, FEDPROXY, ZERO_SHOT
from fedproxy.reporting.comparison_plots import front
from fedproxy.reporting.methods_results import Difference, Row
from fedproxy.reporting.plots import whole_rounds
from fedproxy.reporting.svg import COLOURS, INK, MARKERS, figure, inline, label, legend_text

_LABELLED = 30
"""Rows up to which every mark of a trade-off has its name; of more, only those on the front and the named methods."""
_NAMED = (FEDPROXY, CENTRALIZED, ZERO_SHOT)
_LABEL, _AROUND = 0.165, 0.9
"""Inches that a name beside a trade-off takes, and those above and below its axes."""
_ROW = 0.2
"""Inches that a row of a bar chart or a forest plot takes."""


def trade_off(rows: Sequence[Row], costs: Sequence[float], *, name: str, title: str, axis: str) -> str:
    """Mean accuracy against a cost, with the seeds' range; a line joins the rows that no other one betters in both.

    The names stand in a column, by falling accuracy, each with a line to its mark.

    Args:
        rows: At least one.
        costs: Of each row.
        name: Unique in the page.
        title: Of the figure.
        axis: What the cost is, with its unit.
    """
    best = front([(cost, row.accuracy.mean) for row, cost in zip(rows, costs, strict=True)])
    order = sorted(range(len(rows)), key=lambda index: -rows[index].accuracy.mean)
    on_front = {index for index in order if (costs[index], rows[index].accuracy.mean) in best}
    named = [index for index in order if len(rows) <= _LABELLED or index in on_front or rows[index].method in _NAMED]
    spans = [(100 * row.accuracy.low, 100 * row.accuracy.high) for row in rows]
    bottom, top = min(low for low, _ in spans), max(high for _, high in spans)
    pad = max(0.04 * (top - bottom), 0.001 * max(abs(top), abs(bottom)), 1.0)
    bottom, top = bottom - pad, top + pad
    height = max(2.9, 1.3 + _LABEL * len(named))
    drawn, axes = figure(4.6, height, title)
    axes.set_ylim(bottom, top)
    own = [index for index, row in enumerate(rows) if row.method == FEDPROXY]
    places = beside(costs, [(low - pad / 4, high + pad / 4) for low, high in spans], [*own, *sorted(on_front)])
    axes.plot([cost for cost, _ in best], [100 * score for _, score in best], color=INK, linewidth=0.8, zorder=1)
    for index, (row, x) in enumerate(zip(rows, places, strict=True)):
        colour = COLOURS[0] if index in own else INK
        axes.plot([x, x], spans[index], color=colour, linewidth=1.6 if index in own else 0.9, zorder=2)
        axes.plot(
            [x],
            [100 * row.accuracy.mean],
            linestyle="none",
            marker="s" if index in own else "o",
            markersize=5.5 if index in own else 4.5,
            color=colour,
            markerfacecolor=colour if index in on_front or index in own else "none",
            zorder=4 if index in own else 3,
        )
    wanted = [(100 * rows[index].accuracy.mean - bottom) / (top - bottom) for index in named]
    for index, y in zip(named, spread_out(wanted, _LABEL / (height - _AROUND)), strict=True):
        axes.annotate(
            label(rows[index].label, 22),
            (places[index], 100 * rows[index].accuracy.mean),
            xytext=(1.06, y),
            textcoords="axes fraction",
            va="center",
            color=COLOURS[0] if index in own else INK,
            fontsize=8.5,
            fontweight="bold" if index in on_front else "normal",
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.5, "alpha": 0.45, "relpos": (0, 0.5)},
        )
    axes.set_xlabel(axis)
    axes.set_ylabel("accuracy (%)")
    axes.grid(axis="both")
    text = ", ".join(
        f"{label(rows[index].label, 30)} {100 * rows[index].accuracy.mean:.1f} % at {costs[index]:.3g}"
        for index in order
    )
    return inline(drawn, name, f"Points, a method each; cost in {axis}: {text}.")


def beside(costs: Sequence[float], spans: Sequence[tuple[float, float]], first: Sequence[int] = ()) -> list[float]:
    """Where marks are drawn so that none hides another: at their cost, or as few steps beside it as can be.

    Args:
        costs: Of each mark.
        spans: Lower and upper end of each.
        first: Those that are placed first, and so stay nearest to their cost.
    """
    step = 0.022 * (max(costs) - min(costs) or 1.0)
    places = list(costs)
    drawn: list[int] = []
    for index in dict.fromkeys([*first, *range(len(costs))]):
        low, high = spans[index]
        for away in sorted(range(-len(costs), len(costs) + 1), key=abs):
            places[index] = costs[index] + step * away
            near = [other for other in drawn if abs(places[index] - places[other]) < 0.9 * step]
            if all(high < spans[other][0] or low > spans[other][1] for other in near):
                break
        drawn.append(index)
    return places


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Falling places between 0 and 1, a gap or more apart, as near to the wanted ones as can be (least squares).

    With z_i = y_i + i gap the gaps become an order, z_i ≥ z_i+1: an isotonic regression, by pooling neighbours that
    are out of order; then the ends of the interval bound it. If there is no room for the gaps, they shrink.

    Args:
        wanted: Falling places.
        gap: Between neighbours, and half of it to the ends.

    Example:
        >>> spread_out([0.5, 0.5], 0.25)
        [0.625, 0.375]
    """
    count = len(wanted)
    gap = min(gap, 1 / max(1, count))
    pools: list[tuple[float, int]] = []
    for index, place in enumerate(wanted):
        pools.append((place + index * gap, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (last, many), (before, more) = pools.pop(), pools.pop()
            pools.append(((last * many + before * more) / (many + more), many + more))
    ordered = [value for value, many in pools for _ in range(many)]
    low, high = gap / 2 + (count - 1) * gap, 1 - gap / 2
    return [min(max(value, low), high) - index * gap for index, value in enumerate(ordered)]


def forest(differences: Sequence[Difference], labels: Sequence[str], *, name: str, title: str) -> str:
    """Differences with their intervals, a row each, by falling mean; ticks are the seeds' own.

    Args:
        differences: Against the same method at the same ratio, at least one.
        labels: Of the rows.
        name: Unique in the page.
        title: Of the figure.
    """
    rows = sorted(zip(differences, labels, strict=True), key=lambda row: -row[0].mean)
    drawn, axes = figure(4.6, 1.2 + _ROW * len(rows), title)
    axes.axvline(0, color=INK, linewidth=0.8)
    for place, (found, _) in enumerate(rows):
        colour = {"better": COLOURS[0], "worse": COLOURS[1]}.get(found.verdict, INK)
        axes.plot([100 * found.low, 100 * found.high], [place, place], color=colour, linewidth=1.4)
        axes.plot(
            [100 * value for value in found.by_seed],
            [place] * len(found.by_seed),
            linestyle="none",
            marker="|",
            markersize=7,
            markeredgewidth=0.8,
            color=INK,
            alpha=0.6,
        )
        axes.plot(
            [100 * found.mean],
            [place],
            linestyle="none",
            marker={"better": "^", "worse": "v"}.get(found.verdict, "o"),
            markersize=5.5,
            color=colour,
            markerfacecolor="none" if found.verdict == "undecided" else colour,
        )
    _rows(axes, [text for _, text in rows])
    axes.set_xlabel("difference of the accuracy (points)")
    text = ", ".join(f"{label(text, 30)} {100 * found.mean:+.1f} ({found.verdict})" for found, text in rows)
    return inline(drawn, name, f"Intervals, a row a method, in points: {text}.")


def costs(
    labels: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    totals: Sequence[str],
    *,
    name: str,
    title: str,
    axis: str,
) -> str:
    """Stacked bars, a row a method.

    Args:
        labels: Of the rows.
        parts: Part → its value in every row, in the axis' unit.
        totals: What stands at the end of every row.
        name: Unique in the page.
        title: Of the figure.
        axis: What the values are, with their unit.
    """
    drawn, axes = figure(4.6, 1.3 + _ROW * len(labels), title)
    ends = [0.0] * len(labels)
    for index, (part, values) in enumerate(parts.items()):
        bars = axes.barh(
            range(len(labels)),
            values,
            left=ends,
            height=0.66,
            color=COLOURS[index % len(COLOURS)],
            label=legend_text(part),
        )
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    axes.bar_label(bars, [label(total, 14) for total in totals], padding=3, fontsize=7.5)
    _rows(axes, labels)
    axes.set_xlabel(axis)
    axes.margins(x=0.2)
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(parts)))
    text = ", ".join(f"{label(row, 30)} {total}" for row, total in zip(labels, totals, strict=True))
    return inline(drawn, name, f"Bars of {', '.join(label(part) for part in parts)}, a row a method: {text}.")


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [label(name, 22) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.grid(axis="x")


def has_losses(rows: Sequence[Row]) -> list[Row]:
    """The rows whose rounds have losses."""
    return [row for row in rows if _losses(row)]


def _losses(row: Row) -> dict[int, float]:
    """Round → mean loss over clients and seeds."""
    found: dict[int, list[float]] = {}
    for cell in row.cells:
        for round_ in cell.history.rounds:
            losses = [client.loss for client in round_.clients if client.loss is not None]
            if losses:
                found.setdefault(round_.number, []).append(sum(losses) / len(losses))
    return {number: sum(means) / len(means) for number, means in sorted(found.items())}


def losses(rows: Sequence[Row]) -> str:
    """Mean training loss by round, a line a method.

    Args:
        rows: Those of `has_losses`, at least one.
    """
    drawn, axes = figure(
        4.6, 2.9 + 0.17 * math.ceil(len(rows) / 2), "Training loss by round, mean of clients and seeds"
    )
    lines = [_losses(row) for row in rows]
    for index, (row, means) in enumerate(zip(rows, lines, strict=True)):
        own = row.method == FEDPROXY
        axes.plot(
            list(means),
            list(means.values()),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linewidth=2.4 if own else 1.2,
            markersize=6 if own else 4,
            zorder=3 if own else 2,
        )
    whole_rounds(axes, sorted({number for means in lines for number in means}))
    axes.set_ylabel("loss (nats a token)")
    axes.grid(axis="y")
    drawn.legend(axes.get_lines(), [legend_text(row.label) for row in rows], loc="outside lower center", ncols=2)
    last = ", ".join(
        f"{label(row.label, 30)} {list(means.values())[-1]:.3g}" for row, means in zip(rows, lines, strict=True)
    )
    return inline(drawn, "losses", f"Lines, a method each. In the last round: {last}.")
