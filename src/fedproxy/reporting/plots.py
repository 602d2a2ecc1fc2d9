"""The figures of a run. Each function draws one and returns it as inline SVG; call them inside `svg.drawing()`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedproxy.reporting.results import MODELS, ClientRound, Results, Round
from fedproxy.reporting.svg import COLOURS, INK, MARKERS, figure, inline, label, legend_text
from fedproxy.reporting.units import duration, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMED_CLIENTS = 12
_CLIENT_BARS = 40
_SHORT_LABEL = 20


@dataclass(frozen=True)
class Quantity:
    """What a client reports of each round, for a line plot.

    Attributes:
        title: Of the figure.
        axis: Of the values, with the unit.
        unit: The values are divided by it.
    """

    title: str
    axis: str
    unit: float = 1.0


QUANTITIES = {
    "loss": Quantity("Training loss by client and round", "loss (nats a token)"),
    "seconds": Quantity("Training time by client and round", "seconds"),
    "tokens_per_second": Quantity("Training speed by client and round", "tokens a second"),
    "peak_memory": Quantity("Peak memory by client and round", "GB", 1e9),
    "bytes_up": Quantity("Bytes sent by client and round", "MB", 1e6),
}
"""Fields of `ClientRound`."""


def scores(results: Results) -> str:
    """Each task's score by every model, and the mean: a row of points a task."""
    names = [*results.tasks, "Mean"]
    drawn, axes = figure(4.6, 1.1 + 0.34 * len(names), "Score by task and model")
    for index, (model, scored) in enumerate(results.evaluation.items()):
        values = [scored.tasks.get(task) for task in results.tasks] + [scored.average]
        points = [(100 * value, row) for row, value in enumerate(values) if value is not None]
        main = model == "fused"
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            linestyle="none",
            marker=MARKERS[index],
            markersize=8 if main else 6,
            color=COLOURS[0] if main else INK,
            markerfacecolor=COLOURS[0] if main else "none",
            label=MODELS[model],
            zorder=3 if main else 2,
        )
    score_axis(axes, names)
    columns = 2 if max(len(MODELS[model]) for model in results.evaluation) > _SHORT_LABEL else 3
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    return inline(
        drawn, "scores", "Points: score of every model on each task and in the mean; numbers in the table above."
    )


def score_axis(axes: "Axes", names: Sequence[str]) -> None:
    """A row for each of `names`, scores from 0 to 100 %."""
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("score (%)")
    axes.grid(axis="both")


def has(results: Results, field: str) -> bool:
    """Whether any client has a value of this field of `ClientRound`."""
    return any(getattr(client, field) is not None for round_ in results.rounds for client in round_.clients)


def by_round(results: Results, field: str, *, prefix: str = "") -> str:
    """A line a client of one of `QUANTITIES`, by round; `prefix` begins the figure's name."""
    quantity, names = QUANTITIES[field], results.clients
    lines: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for round_ in results.rounds:
        for client in round_.clients:
            value = getattr(client, field)
            if value is not None:
                lines[client.name].append((round_.number, value / quantity.unit))
    named = len(names) <= _NAMED_CLIENTS
    legend_rows = math.ceil(len(names) / 2) if named else 0
    drawn, axes = figure(4.6, 2.9 + 0.17 * legend_rows, quantity.title)
    for index, points in enumerate(lines.values()):
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=COLOURS[index % len(COLOURS)] if named else INK,
            alpha=1.0 if named else 0.35,
            linewidth=1.8 if named else 0.8,
            marker=MARKERS[index % len(MARKERS)] if named else None,
            markersize=5,
        )
    if named and names:
        drawn.legend(axes.get_lines(), [legend_text(name) for name in names], loc="outside lower center", ncols=2)
    whole_rounds(axes, [round_.number for round_ in results.rounds])
    axes.set_ylim(0, 1.08 * max(y for points in lines.values() for _, y in points) or 1)
    axes.set_ylabel(quantity.axis)
    axes.grid(axis="y")
    last = ", ".join(f"{label(name)} {points[-1][1]:.3g}" for name, points in lines.items() if points)
    return inline(drawn, prefix + field.replace("_", "-"), f"Lines, in {quantity.axis}. At the end: {last}.")


def conflict(round_: Round) -> str:
    """Share of the coordinates at each level of conflict."""
    total = sum(round_.conflict) or 1
    clients = len(round_.conflict) - 1
    shares = [100 * count / total for count in round_.conflict]
    levels = [index / clients for index in range(len(shares))]
    drawn, axes = figure(4.6, 2.9, f"Conflict between the clients, round {round_.number}")
    bars = axes.bar(levels, shares, width=0.8 / clients, color=COLOURS[0])
    if clients <= 10:
        axes.bar_label(
            bars, [f"{share:.1f}" if count else "" for share, count in zip(shares, round_.conflict, strict=True)]
        )
        axes.set_xticks(levels, [f"{level:.2f}".rstrip("0").rstrip(".") for level in levels])
    axes.set_xlabel("conflict (0: all signs agree, 1: they cancel)")
    axes.set_ylabel("coordinates (%)")
    axes.grid(axis="y")
    axes.margins(y=0.12)
    text = ", ".join(f"{share:.1f} % at {level:.2f}" for share, level in zip(shares, levels, strict=True) if share)
    return inline(drawn, "conflict", f"Histogram of the conflict of all trained coordinates: {text}.")


def blocks(results: Results, *, prefix: str = "") -> str:
    """Score of each block of the LLM; kept ones filled, removed ones hatched. `prefix` begins the figure's name."""
    kept = set(results.layer_map)
    positive = [score for score in results.scores if score > 0]
    logarithmic = len(positive) == len(results.scores) and max(positive) > 20 * min(positive)
    drawn, axes = figure(4.6, 3.1, "Score of each block: which ones the proxy keeps")
    for chosen, text in ((True, "kept"), (False, "removed")):
        numbers = [index for index in range(len(results.scores)) if (index in kept) == chosen]
        axes.bar(
            numbers,
            [results.scores[index] for index in numbers],
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
    step = math.ceil(len(results.scores) / 16)
    axes.set_xticks(range(0, len(results.scores), step))
    axes.set_xlabel("block of the LLM (counted from 0)")
    name = results.setting("compress", "score")
    axes.set_ylabel(label(f"{name if isinstance(name, str) else 'score'}{', log scale' if logarithmic else ''}", 40))
    axes.grid(axis="y")
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return inline(
        drawn,
        f"{prefix}blocks",
        f"Bars: score of each of {len(results.scores)} blocks. Kept: {', '.join(map(str, sorted(kept)))}.",
    )


def stages(results: Results) -> str:
    """Seconds of each stage."""
    names, values = list(results.seconds), list(results.seconds.values())
    drawn, axes = figure(4.6, 1.0 + 0.32 * len(names), "Time by stage")
    bars = axes.barh(range(len(names)), values, color=COLOURS[0], height=0.62)
    axes.bar_label(bars, [duration(value) for value in values], padding=3)
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("wall-clock time (s)")
    axes.grid(axis="x")
    axes.margins(x=0.18)
    text = ", ".join(f"{label(name)} {duration(value)}" for name, value in results.seconds.items())
    return inline(drawn, "stages", f"Bars: wall-clock time of each stage: {text}.")


def traffic(results: Results) -> str | None:
    """Bytes that each client sent and received in all rounds; none if they are too many for bars, or unknown."""
    names = results.clients
    replies = [client for round_ in results.rounds for client in round_.clients]
    sent = {name: sum(c.bytes_up or 0 for c in replies if c.name == name) for name in names}
    received = {name: sum(c.bytes_down or 0 for c in replies if c.name == name) for name in names}
    if len(names) > _CLIENT_BARS or not any(sent.values()):
        return None
    drawn, axes = figure(4.6, 1.2 + 0.42 * len(names), "Bytes by client, all rounds")
    for offset, values, text, filled in ((-0.19, sent, "sent", True), (0.19, received, "received", False)):
        bars = axes.barh(
            [row + offset for row in range(len(names))],
            [values[name] / 1e6 for name in names],
            height=0.36,
            color=COLOURS[0] if filled else "none",
            edgecolor=COLOURS[0] if filled else INK,
            linewidth=0.8,
            hatch=None if filled else "////",
            label=text,
        )
        axes.bar_label(bars, [size(values[name]) for name in names], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("MB")
    axes.grid(axis="x")
    axes.margins(x=0.2)
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    text = ", ".join(f"{label(name)} sent {size(sent[name])} and received {size(received[name])}" for name in names)
    return inline(drawn, "traffic", f"Bars, two a client: {text}.")


def whole_rounds(axes: "Axes", numbers: Sequence[int]) -> None:
    """Ticks at whole rounds, at most a dozen."""
    axes.set_xticks(numbers[:: math.ceil(len(numbers) / 12)])
    axes.set_xlim(min(numbers) - 0.3, max(numbers) + 0.3)
    axes.set_xlabel("round")


def same_in_all(results: Results, field: str) -> bool:
    """Whether every client has the same value of this field of `ClientRound` in every round."""
    replies: list[ClientRound] = [client for round_ in results.rounds for client in round_.clients]
    return len({getattr(client, field) for client in replies}) == 1
