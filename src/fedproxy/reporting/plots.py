"""The charts of all pages: plain data to inline SVG. Each function draws one; call them inside `svg.drawing()`."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedproxy.records import Difference, Proxy, Round
from fedproxy.reporting.rows import Spread
from fedproxy.reporting.svg import COLOURS, INK, MARKERS, figure, inline, label, legend_text
from fedproxy.reporting.units import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMED_CLIENTS = 12
_CLIENT_BARS = 40
_SHORT_LABEL = 20
_LABELLED = 30
"""Marks up to which every one of a trade-off has its name; of more, only those on the front and those that matter."""
_LABEL, _AROUND = 0.165, 0.9
"""Inches that a name beside a trade-off takes, and those above and below its axes."""
_ROW = 0.2
"""Inches that a row of a bar chart or a forest plot takes."""


QUANTITIES = {
    "loss": ("Training loss by client and round", "loss (nats a token)", 1.0),
    "seconds": ("Training time by client and round", "seconds", 1.0),
    "tokens_per_second": ("Training speed by client and round", "tokens a second", 1.0),
    "peak_memory": ("Peak memory by client and round", "GB", 1e9),
    "bytes_up": ("Bytes sent by client and round", "MB", 1e6),
}
"""Fields of `records.Client` → title, axis with the unit, and what the values are divided by."""


def points(
    found: Mapping[str, Sequence[float | None]], rows: Sequence[str], *, name: str, title: str, text: str, own: str = ""
) -> str:
    """Scores, a row of points each; numbers are in the table.

    Args:
        found: What was scored → its score in each row, a share of 1.
        rows: Their names.
        name: Unique in the page.
        title: Of the figure.
        text: What the figure shows, for who cannot see it.
        own: The one whose marks are filled, those of the others are hollow; none: all have colours, side by side.
    """
    beneath = 0.0 if own else 0.17 * math.ceil(len(found) / 2)
    drawn, axes = figure(4.6, 1.1 + (0.34 if own else 0.3 + 0.04 * len(found)) * len(rows) + beneath, title)
    for index, (what, values) in enumerate(found.items()):
        shift = 0.0 if own else 0.6 * ((index + 0.5) / len(found) - 0.5)  # marks of one row must not hide each other
        places = [(100 * value, row + shift) for row, value in enumerate(values) if value is not None]
        main = what == own
        colour = (COLOURS[0] if main else INK) if own else COLOURS[index % len(COLOURS)]
        axes.plot(
            [x for x, _ in places],
            [y for _, y in places],
            linestyle="none",
            marker=MARKERS[index % len(MARKERS)],
            markersize=8 if main else 6,
            color=colour,
            markerfacecolor="none" if own and not main else colour,
            zorder=3 if main else 2,
        )
    axes.set_yticks(range(len(rows)), [label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("score (%)")
    axes.grid(axis="both")
    columns = 3 if own and max(map(len, found)) <= _SHORT_LABEL else 2
    names = [legend_text(what, 40) for what in found]
    drawn.legend(axes.get_lines(), names, loc="outside lower center", ncols=columns)
    return inline(drawn, name, text)


def lines(
    found: Mapping[str, Mapping[int, float]],
    *,
    name: str,
    title: str,
    axis: str,
    each: str,
    own: Collection[str] | None = None,
    named: bool = True,
    log: bool = False,
) -> str:
    """Values by round, a line each.

    Args:
        found: What has a line → round → value; at least one value.
        name: Unique in the page.
        title: Of the figure.
        axis: What the values are, with their unit.
        each: What a line is.
        own: Those with a thick line, of many that lie near each other; none: all are alike, above a floor of 0.
        named: Whether the lines have colours and a legend.
        log: Whether equal steps of the axis are equal ratios; all values must be above 0.
    """
    drawn, axes = figure(4.6, 2.9 + (0.17 * math.ceil(len(found) / 2) if named else 0), title)
    for index, (what, values) in enumerate(found.items()):
        thick, thin = own is not None and what in own, own is not None and what not in own
        axes.plot(
            list(values),
            list(values.values()),
            color=COLOURS[index % len(COLOURS)] if named else INK,
            alpha=1.0 if named else 0.35,
            linewidth=2.4 if thick else 1.2 if thin else 1.8 if named else 0.8,
            marker=MARKERS[index % len(MARKERS)] if named else None,
            markersize=6 if thick else 4 if thin else 5,
            zorder=3 if thick else 2,
        )
    if named:
        drawn.legend(axes.get_lines(), [legend_text(what) for what in found], loc="outside lower center", ncols=2)
    rounds = sorted({number for values in found.values() for number in values})
    axes.set_xticks(rounds[:: math.ceil(len(rounds) / 12)])
    axes.set_xlim(min(rounds) - 0.3, max(rounds) + 0.3)
    axes.set_xlabel("round")
    if own is None:
        axes.set_ylim(0, 1.08 * max(value for values in found.values() for value in values.values()) or 1)
    if log:
        _logarithmic(axes)
    axes.set_ylabel(axis)
    axes.grid(axis="y")
    last = ", ".join(f"{label(what, 30)} {list(values.values())[-1]:.3g}" for what, values in found.items() if values)
    return inline(drawn, name, f"Lines, {each}. At the end: {last}.")


def _logarithmic(axes: "Axes") -> None:
    """Let equal steps upwards be equal ratios, with 1, 2 and 5 of each power of ten written out."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())


def has(rounds: Sequence[Round], field: str) -> bool:
    """Whether any client has a value of this one of `QUANTITIES`."""
    return any(getattr(client, field) is not None for round_ in rounds for client in round_.clients.values())


def by_round(rounds: Sequence[Round], field: str, *, prefix: str = "") -> str:
    """A line a client of one of `QUANTITIES`, by round; `prefix` begins the figure's name."""
    title, axis, unit = QUANTITIES[field]
    found: dict[str, dict[int, float]] = {name: {} for round_ in rounds for name in round_.clients}
    for round_ in rounds:
        for name, client in round_.clients.items():
            if (value := getattr(client, field)) is not None:
                found[name][round_.number] = value / unit
    return lines(
        found,
        name=prefix + field.replace("_", "-"),
        title=title,
        axis=axis,
        each=f"a client each, in {axis}",
        named=len(found) <= _NAMED_CLIENTS,
    )


def conflict(round_: Round) -> str:
    """Share of the coordinates at each level of conflict."""
    counts = round_.analysis.conflict_histogram
    total = sum(counts) or 1
    clients = len(counts) - 1
    shares = [100 * count / total for count in counts]
    levels = [index / clients for index in range(len(shares))]
    drawn, axes = figure(4.6, 2.9, f"Conflict between the clients, round {round_.number}")
    bars = axes.bar(levels, shares, width=0.8 / clients, color=COLOURS[0])
    if clients <= 10:
        axes.bar_label(bars, [f"{share:.1f}" if count else "" for share, count in zip(shares, counts, strict=True)])
        axes.set_xticks(levels, [f"{level:.2f}".rstrip("0").rstrip(".") for level in levels])
    axes.set_xlabel("conflict (0: all signs agree, 1: they cancel)")
    axes.set_ylabel("coordinates (%)")
    axes.grid(axis="y")
    axes.margins(y=0.12)
    text = ", ".join(f"{share:.1f} % at {level:.2f}" for share, level in zip(shares, levels, strict=True) if share)
    return inline(drawn, "conflict", f"Histogram of the conflict of all trained coordinates: {text}.")


def blocks(proxy: Proxy, name: str, *, prefix: str = "") -> str:
    """Score of each block of the LLM; kept ones filled, removed ones hatched.

    Args:
        proxy: Has the scores.
        name: Of the score.
        prefix: Begins the figure's name.
    """
    kept = set(proxy.layer_map)
    positive = [score for score in proxy.scores if score > 0]
    logarithmic = len(positive) == len(proxy.scores) and max(positive) > 20 * min(positive)
    drawn, axes = figure(4.6, 3.1, "Score of each block: which ones the proxy keeps")
    for chosen, text in ((True, "kept"), (False, "removed")):
        numbers = [index for index in range(len(proxy.scores)) if (index in kept) == chosen]
        axes.bar(
            numbers,
            [proxy.scores[index] for index in numbers],
            color=COLOURS[0] if chosen else "none",
            edgecolor=COLOURS[0] if chosen else INK,
            linewidth=0.8,
            hatch=None if chosen else "////",
            label=text,
        )
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    step = math.ceil(len(proxy.scores) / 16)
    axes.set_xticks(range(0, len(proxy.scores), step))
    axes.set_xlabel("block of the LLM (counted from 0)")
    axes.set_ylabel(label(f"{name}{', log scale' if logarithmic else ''}", 40))
    axes.grid(axis="y")
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return inline(
        drawn,
        f"{prefix}blocks",
        f"Bars: score of each of {len(proxy.scores)} blocks. Kept: {', '.join(map(str, sorted(kept)))}.",
    )


def bars(
    labels: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    totals: Sequence[str],
    *,
    name: str,
    title: str,
    axis: str,
    row: float = _ROW,
) -> str:
    """Stacked bars.

    Args:
        labels: Of the rows.
        parts: Part → its value in every row, in the axis' unit.
        totals: What stands at the end of every row.
        name: Unique in the page.
        title: Of the figure.
        axis: What the values are, with their unit.
        row: Inches that a row takes.
    """
    drawn, axes = figure(4.6, (1.3 if len(parts) > 1 else 1.0) + row * len(labels), title)
    ends = [0.0] * len(labels)
    for index, (part, values) in enumerate(parts.items()):
        ended = axes.barh(
            range(len(labels)),
            values,
            left=ends,
            height=0.66,
            color=COLOURS[index % len(COLOURS)],
            label=legend_text(part),
        )
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    axes.bar_label(ended, [label(total) for total in totals], padding=3, fontsize=min(9, 37.5 * row))
    _rows(axes, labels)
    axes.set_xlabel(axis)
    axes.margins(x=0.2)
    if len(parts) > 1:
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(parts)))
    text = ", ".join(f"{label(each, 30)} {total}" for each, total in zip(labels, totals, strict=True))
    return inline(drawn, name, f"Bars of {', '.join(map(label, parts))}, a row each: {text}.")


def _rows(axes: "Axes", names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [label(name, 22) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.grid(axis="x")


def traffic(rounds: Sequence[Round]) -> str | None:
    """Bytes that each client sent and received in all rounds; none if they are too many for bars, or unknown."""
    names = list(dict.fromkeys(name for round_ in rounds for name in round_.clients))
    replies = [[round_.clients[name] for round_ in rounds if name in round_.clients] for name in names]
    sent = [sum(client.bytes_up or 0 for client in each) for each in replies]
    received = [sum(client.bytes_down or 0 for client in each) for each in replies]
    if len(names) > _CLIENT_BARS or not any(sent):
        return None
    return bars(
        names,
        {"sent": [up / 1e6 for up in sent], "received": [down / 1e6 for down in received]},
        [f"{size(up)} + {size(down)}" for up, down in zip(sent, received, strict=True)],
        name="traffic",
        title="Bytes by client, all rounds",
        axis="sent and received (MB)",
    )


@dataclass(frozen=True)
class Mark:
    """A point of a trade-off: its name, cost, and score with its range; whether it is ours, and always has its name."""

    label: str
    cost: float
    score: Spread
    own: bool = False
    named: bool = False


def trade_off(marks: Sequence[Mark], *, name: str, title: str, axis: str, score: str) -> str:
    """Scores against a cost, with their ranges; a line joins the marks that no other one betters in both.

    The names stand in a column, by falling score, each with a line to its mark.

    Args:
        marks: At least one.
        name: Unique in the page.
        title: Of the figure.
        axis: What the cost is, with its unit.
        score: What the score is, with its unit.
    """
    best = front([(mark.cost, mark.score.mean) for mark in marks])
    order = sorted(range(len(marks)), key=lambda index: -marks[index].score.mean)
    on_front = {index for index in order if (marks[index].cost, marks[index].score.mean) in best}
    named = [index for index in order if len(marks) <= _LABELLED or index in on_front or marks[index].named]
    spans = [(100 * mark.score.low, 100 * mark.score.high) for mark in marks]
    bottom, top = min(low for low, _ in spans), max(high for _, high in spans)
    pad = max(0.04 * (top - bottom), 0.001 * max(abs(top), abs(bottom)), 1.0)
    bottom, top = bottom - pad, top + pad
    height = max(2.9, 1.3 + _LABEL * len(named))
    drawn, axes = figure(4.6, height, title)
    axes.set_ylim(bottom, top)
    own = [index for index, mark in enumerate(marks) if mark.own]
    costs = [mark.cost for mark in marks]
    places = beside(costs, [(low - pad / 4, high + pad / 4) for low, high in spans], [*own, *sorted(on_front)])
    axes.plot([cost for cost, _ in best], [100 * mean for _, mean in best], color=INK, linewidth=0.8, zorder=1)
    for index, (mark, x) in enumerate(zip(marks, places, strict=True)):
        colour = COLOURS[0] if mark.own else INK
        axes.plot([x, x], spans[index], color=colour, linewidth=1.6 if mark.own else 0.9, zorder=2)
        axes.plot(
            [x],
            [100 * mark.score.mean],
            linestyle="none",
            marker="s" if mark.own else "o",
            markersize=5.5 if mark.own else 4.5,
            color=colour,
            markerfacecolor=colour if index in on_front or mark.own else "none",
            zorder=4 if mark.own else 3,
        )
    wanted = [(100 * marks[index].score.mean - bottom) / (top - bottom) for index in named]
    for index, y in zip(named, spread_out(wanted, _LABEL / (height - _AROUND)), strict=True):
        axes.annotate(
            label(marks[index].label, 22),
            (places[index], 100 * marks[index].score.mean),
            xytext=(1.06, y),
            textcoords="axes fraction",
            va="center",
            color=COLOURS[0] if index in own else INK,
            fontsize=8.5,
            fontweight="bold" if index in on_front else "normal",
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.5, "alpha": 0.45, "relpos": (0, 0.5)},
        )
    if min(costs) > 0:
        axes.set_xlim(left=0)
    axes.set_xlabel(axis)
    axes.set_ylabel(score)
    axes.grid(axis="both")
    found = (marks[index] for index in order)
    text = ", ".join(f"{label(mark.label, 30)} {100 * mark.score.mean:.1f} % at {mark.cost:.3g}" for mark in found)
    return inline(drawn, name, f"Points, one each; cost in {axis}: {text}.")


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


def forest(differences: Sequence[Difference], *, name: str, title: str) -> str:
    """Differences with their intervals, a row each, by falling mean; ticks are the seeds' own.

    Args:
        differences: Against the same method at the same ratio, at least one.
        name: Unique in the page.
        title: Of the figure.
    """
    rows = sorted(differences, key=lambda found: -found.mean)
    drawn, axes = figure(4.6, 1.2 + _ROW * len(rows), title)
    axes.axvline(0, color=INK, linewidth=0.8)
    for place, found in enumerate(rows):
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
    _rows(axes, [found.method for found in rows])
    axes.set_xlabel("difference of the accuracy (points)")
    text = ", ".join(f"{label(found.method, 30)} {100 * found.mean:+.1f} ({found.verdict})" for found in rows)
    return inline(drawn, name, f"Intervals, a row a method, in points: {text}.")
