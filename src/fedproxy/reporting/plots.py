"""The report's figures. Each function draws one and returns it as inline SVG; call them inside `svg.drawing()`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedproxy.reporting.results import MODELS, Results, Round
from fedproxy.reporting.svg import COLOURS, GRID, INK, figure, inline
from fedproxy.reporting.units import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
_NAMED_CLIENTS = 12
_SHORT_LABEL = 20


def label(name: str, length: int = 20) -> str:
    """A name fit for a figure: printable, on one line, cut to `length` characters."""
    text = "".join(letter if letter.isprintable() else "�" for letter in name)
    return text if len(text) <= length else text[: length - 1] + "…"


def scores(results: Results) -> str:
    """Each task's score by every model, and the mean: a row of points a task."""
    names = [*results.tasks, "Mean"]
    drawn, axes = figure(4.6, 1.1 + 0.34 * len(names))
    for index, (model, scored) in enumerate(results.evaluation.items()):
        values = [scored.tasks.get(task) for task in results.tasks] + [scored.average]
        points = [(100 * value, row) for row, value in enumerate(values) if value is not None]
        main = model == "fused"
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            linestyle="none",
            marker=_MARKERS[index],
            markersize=8 if main else 6,
            color=COLOURS[0] if main else INK,
            markerfacecolor=COLOURS[0] if main else "none",
            label=MODELS[model],
            zorder=3 if main else 2,
        )
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("score (%)")
    axes.set_title("Score by task and model")
    axes.grid(axis="both")
    columns = 2 if max(len(MODELS[model]) for model in results.evaluation) > _SHORT_LABEL else 3
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    return inline(
        drawn, "scores", "Points: score of every model on each task and in the mean; numbers in the table above."
    )


def losses(results: Results) -> str:
    """Mean training loss of each client by round."""
    names = list(dict.fromkeys(client.name for round_ in results.rounds for client in round_.clients))
    lines: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for round_ in results.rounds:
        for client in round_.clients:
            if client.loss is not None:
                lines[client.name].append((round_.number, client.loss))
    named = len(names) <= _NAMED_CLIENTS
    legend_rows = math.ceil(len(names) / 2) if named else 0
    drawn, axes = figure(4.6, 2.9 + 0.17 * legend_rows)
    for index, points in enumerate(lines.values()):
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=COLOURS[index % len(COLOURS)] if named else INK,
            alpha=1.0 if named else 0.35,
            linewidth=1.8 if named else 0.8,
            marker=_MARKERS[index % len(_MARKERS)] if named else None,
            markersize=5,
        )
    if named and names:
        drawn.legend(axes.get_lines(), [_legend_text(name) for name in names], loc="outside lower center", ncols=2)
    _whole_rounds(axes, results.rounds)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss (nats a token)")
    axes.set_title("Training loss by client and round")
    axes.grid(axis="y")
    last = [f"{label(name)} {points[-1][1]:.2f}" for name, points in lines.items() if points]
    return inline(
        drawn, "losses", "Line plot of each client's training loss by round. At the end: " + ", ".join(last) + "."
    )


def similarity(round_: Round, limit: float, *, small: bool = False) -> str:
    """Cosine between the clients' updates: a square of cells, with numbers unless `small`.

    Args:
        round_: The round.
        limit: Cosine of the strongest colour.
        small: Leave out names, numbers and colour key.
    """
    from matplotlib.patches import Rectangle

    count = len(round_.names)
    side = 1.5 if small else 2.8 + min(1.6, 0.15 * count)
    drawn, axes = figure(side if small else side + 0.9, side)
    for row in range(count):
        for column in range(count):
            value = round_.similarity[row][column]
            if row == column:
                cell = Rectangle((column, row), 1, 1, facecolor="none", edgecolor=GRID, hatch="////", linewidth=0.5)
            else:
                cell = Rectangle((column, row), 1, 1, edgecolor=GRID, linewidth=0.5, facecolor=_shade(value, limit))
            axes.add_patch(cell)
            if not small and row != column and count <= _NAMED_CLIENTS:
                axes.text(
                    column + 0.5, row + 0.5, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", fontsize=8.5
                )
    axes.set(xlim=(0, count), ylim=(count, 0), aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    name = f"similarity{round_.number}"
    if small:
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"Round {round_.number}", fontweight="normal", fontsize=9)
        return inline(drawn, name, f"Similarity of the clients' updates in round {round_.number}.")
    ticks = [index + 0.5 for index in range(count)] if count <= 30 else []
    names = [label(client, 14) for client in round_.names][: len(ticks)]
    crowded = count > _NAMED_CLIENTS
    axes.set_xticks(ticks, names, rotation=90 if crowded else 40, ha="right", va="center", rotation_mode="anchor")
    axes.set_yticks(ticks, names)
    axes.tick_params(labelsize=7 if crowded else 9)
    axes.set_title(f"Similarity of the updates, round {round_.number}")
    axes.set_xlabel("client")
    axes.set_ylabel("client")
    _colour_key(axes, limit)
    pairs = [round_.similarity[i][j] for i in range(count) for j in range(i)]
    return inline(
        drawn,
        name,
        f"Heat map of the cosine between each two clients' updates in round {round_.number}: "
        f"from {min(pairs):.2f} to {max(pairs):.2f}, mean {sum(pairs) / len(pairs):.2f}.",
    )


def similarity_limit(rounds: Sequence[Round]) -> float:
    """The cosine that gets the strongest colour in all rounds: the largest of all, rounded up to a tenth."""
    found = [
        abs(value)
        for round_ in rounds
        for row, values in enumerate(round_.similarity)
        for column, value in enumerate(values)
        if row != column
    ]
    return max(0.1, math.ceil(10 * max(found, default=0.0) - 1e-9) / 10)


def conflict(round_: Round) -> str:
    """Share of the coordinates at each level of conflict."""
    total = sum(round_.conflict) or 1
    clients = len(round_.conflict) - 1
    shares = [100 * count / total for count in round_.conflict]
    levels = [index / clients for index in range(len(shares))]
    drawn, axes = figure(4.6, 2.9)
    bars = axes.bar(levels, shares, width=0.8 / clients, color=COLOURS[0])
    if clients <= 10:
        axes.bar_label(
            bars, [f"{share:.1f}" if count else "" for share, count in zip(shares, round_.conflict, strict=True)]
        )
        axes.set_xticks(levels, [f"{level:.2f}".rstrip("0").rstrip(".") for level in levels])
    axes.set_xlabel("conflict (0: all signs agree, 1: they cancel)")
    axes.set_ylabel("coordinates (%)")
    axes.set_title(f"Conflict between the clients, round {round_.number}")
    axes.grid(axis="y")
    axes.margins(y=0.12)
    text = ", ".join(f"{share:.1f} % at {level:.2f}" for share, level in zip(shares, levels, strict=True) if share)
    return inline(drawn, "conflict", f"Histogram of the conflict of all trained coordinates: {text}.")


def blocks(results: Results) -> str:
    """Score of each block of the LLM; kept ones filled, removed ones hatched."""
    kept = set(results.layer_map)
    positive = [score for score in results.scores if score > 0]
    logarithmic = len(positive) == len(results.scores) and max(positive) > 20 * min(positive)
    drawn, axes = figure(4.6, 3.1)
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
    axes.set_title("Score of each block: which ones the proxy keeps")
    axes.grid(axis="y")
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return inline(
        drawn,
        "blocks",
        f"Bars: score of each of {len(results.scores)} blocks. Kept: {', '.join(map(str, sorted(kept)))}.",
    )


def stages(results: Results) -> str:
    """Seconds of each stage."""
    names, values = list(results.seconds), list(results.seconds.values())
    drawn, axes = figure(4.6, 1.0 + 0.32 * len(names))
    bars = axes.barh(range(len(names)), values, color=COLOURS[0], height=0.62)
    axes.bar_label(bars, [duration(value) for value in values], padding=3)
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("wall-clock time (s)")
    axes.set_title("Time by stage")
    axes.grid(axis="x")
    axes.margins(x=0.18)
    text = ", ".join(f"{label(name)} {duration(value)}" for name, value in results.seconds.items())
    return inline(drawn, "stages", f"Bars: wall-clock time of each stage: {text}.")


def _shade(value: float, limit: float) -> tuple[str, float]:
    """Blue for positive, orange for negative; the stronger the farther from 0."""
    return COLOURS[0] if value >= 0 else COLOURS[1], 0.65 * min(1.0, abs(value) / limit)


def _colour_key(axes: "Axes", limit: float) -> None:
    """A strip beside `axes` with the cosine of each shade."""
    from matplotlib.patches import Rectangle

    key = axes.inset_axes((1.06, 0, 0.06, 1))
    steps = 20
    height = 2 * limit / steps
    for index in range(steps):
        bottom = -limit + index * height
        key.add_patch(Rectangle((0, bottom), 1, height, linewidth=0, facecolor=_shade(bottom + height / 2, limit)))
    key.set(xlim=(0, 1), ylim=(-limit, limit), xticks=[])
    key.yaxis.tick_right()
    key.yaxis.set_label_position("right")
    key.set_ylabel("cosine")
    for side in ("top", "right"):
        key.spines[side].set_visible(True)


def _legend_text(name: str) -> str:
    """A label that matplotlib shows even where the name begins with an underscore."""
    return label(name) if not name.startswith("_") else "\u200b" + label(name)


def _whole_rounds(axes: "Axes", rounds: Sequence[Round]) -> None:
    """Ticks at whole rounds, at most a dozen."""
    numbers = [round_.number for round_ in rounds]
    axes.set_xticks(numbers[:: math.ceil(len(numbers) / 12)])
    axes.set_xlim(min(numbers) - 0.3, max(numbers) + 0.3)
    axes.set_xlabel("round")
