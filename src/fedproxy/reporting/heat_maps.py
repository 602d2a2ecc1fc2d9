"""Heat maps of the report: similarity of the clients, conflict by block. Call them inside `svg.drawing()`."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fedproxy.records import Round
from fedproxy.reporting.conflict import Conflict
from fedproxy.reporting.svg import COLOURS, GRID, figure, inline, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUMBERED = 12
"""Rows or columns up to which the cells bear their numbers."""
STRONGEST = 0.5
"""Opacity of the strongest shade: text on it must stay legible on light and on dark ground."""
_CLIENTS, _SMALL, _SMALL_CELLS = 60, 24, 4000
"""Clients up to which there is a heat map; small ones at most, and cells in all of them."""

Shade = Callable[[float], tuple[str, float]]


def similarity(round_: Round, limit: float, *, small: bool = False, prefix: str = "") -> str:
    """Cosine between the clients' updates: a square of cells, with numbers unless `small`.

    Args:
        round_: The round.
        limit: Cosine of the strongest colour.
        small: Leave out names, numbers and colour key.
        prefix: Of the figure's name, where a page has several of the same round.
    """
    names, rows = round_.analysis.names, round_.analysis.similarity
    count = len(names)
    side = 1.5 if small else 2.8 + min(1.6, 0.15 * count)
    title = f"Round {round_.number}" if small else f"Similarity of the updates, round {round_.number}"
    drawn, axes = figure(side if small else side + 0.9, side, title)
    cells = [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(rows)]

    def shade(value: float) -> tuple[str, float]:
        """Blue for positive, orange for negative; the stronger the farther from 0."""
        return COLOURS[0] if value >= 0 else COLOURS[1], STRONGEST * min(1.0, abs(value) / limit)

    _cells(axes, cells, shade, numbers=not small and count <= NUMBERED)
    axes.set_aspect("equal")
    pairs = [rows[i][j] for i in range(count) for j in range(i)]
    if small:
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontweight="normal", fontsize=9)
    else:
        _names(axes, names, names)
        axes.set(xlabel="client", ylabel="client")
        _colour_key(axes, -limit, limit, shade, "cosine")
    text = (
        f"{'Cosine' if small else 'Heat map of the cosine'} between each two clients' updates in round "
        f"{round_.number}: from {min(pairs):.2f} to {max(pairs):.2f}, mean {sum(pairs) / len(pairs):.2f}."
    )
    return inline(drawn, f"{prefix}similarity{round_.number}", text)


def similarity_limit(rounds: Sequence[Round]) -> float:
    """The cosine that gets the strongest colour in all rounds: the largest of all, rounded up to a tenth."""
    found = [
        abs(value)
        for round_ in rounds
        for row, values in enumerate(round_.analysis.similarity)
        for column, value in enumerate(values)
        if row != column
    ]
    return max(0.1, math.ceil(10 * max(found, default=0.0) - 1e-9) / 10)


def similarities(rounds: Sequence[Round], *, prefix: str = "") -> dict[str, Any]:
    """The last round's similarity, and small ones of rounds before it: as many as are legible, evenly spread.

    Args:
        rounds: Those in which updates were compared.
        prefix: Of the figures' names.

    Returns:
        "similarity" and "small_similarities"; nothing if there are too many clients.
    """
    if len(rounds[-1].analysis.names) > _CLIENTS:
        return {}
    limit = similarity_limit(rounds)
    before = rounds[:-1]
    most = min(_SMALL, max(1, _SMALL_CELLS // len(rounds[-1].analysis.names) ** 2))
    chosen = before if len(before) <= most else [before[index * len(before) // most] for index in range(most)]
    small = [similarity(each, limit, small=True, prefix=prefix) for each in chosen]
    return {"similarity": similarity(rounds[-1], limit, prefix=prefix), "small_similarities": small}


def conflict_by_block(rounds: Sequence[Conflict], *, prefix: str = "") -> str:
    """Mean conflict of each block after each round; `prefix` begins the figure's name."""
    blocks = sorted({block for each in rounds for block in each.blocks})
    cells = [[each.blocks.get(block) for each in rounds] for block in blocks]
    title = "Mean conflict by block and round"
    return _conflict(title, f"{prefix}conflict-blocks", cells, blocks, [str(each.round) for each in rounds], "round")


def conflict_by_layer(last: Conflict) -> str:
    """Mean conflict of each kind of layer in each block after one round."""
    blocks, kinds = sorted(last.blocks), list(dict.fromkeys(kind for _, kind in last.means))
    cells = [[last.means.get((block, kind)) for kind in kinds] for block in blocks]
    title = f"Mean conflict by kind of layer, round {last.round}"
    return _conflict(title, "conflict-layers", cells, blocks, kinds, "kind of layer")


def _conflict(
    title: str, name: str, cells: list[list[float | None]], blocks: list[int], columns: list[str], below: str
) -> str:
    found = [value for row in cells for value in row if value is not None]
    low, high = math.floor(20 * min(found) + 1e-9) / 20, math.ceil(20 * max(found) - 1e-9) / 20
    high = max(high, low + 0.05)

    def shade(value: float) -> tuple[str, float]:
        return COLOURS[1], STRONGEST * min(1.0, max(0.0, (value - low) / (high - low)))

    wide = max(4.0, min(6.2, 1.8 + 0.42 * len(columns)))
    drawn, axes = figure(wide, 1.6 + min(5.0, 0.24 * len(blocks)), title)
    _cells(axes, cells, shade, numbers=len(columns) <= NUMBERED and len(blocks) <= 40)
    _names(axes, [str(block) for block in blocks], [label(column, 22) for column in columns], upright=below == "round")
    axes.set_xlabel(below)
    axes.set_ylabel("block of the LLM")
    _colour_key(axes, low, high, shade, "mean conflict")
    _, highest = max(
        (value, block) for block, row in zip(blocks, cells, strict=True) for value in row if value is not None
    )
    text = f"Heat map, from {min(found):.3f} to {max(found):.3f}; the highest value is in block {highest}."
    return inline(drawn, name, text)


def _cells(axes: "Axes", cells: Sequence[Sequence[float | None]], shade: Shade, *, numbers: bool) -> None:
    """One rectangle a value, hatched where there is none."""
    from matplotlib.patches import Rectangle

    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            how = {"facecolor": "none", "hatch": "////"} if value is None else {"facecolor": shade(value)}
            axes.add_patch(Rectangle((column, row), 1, 1, edgecolor=GRID, linewidth=0.5, **how))
            if numbers and value is not None:
                text = f"{round(value, 2) + 0.0:.2f}"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, len(cells[0])), ylim=(len(cells), 0))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def _names(axes: "Axes", rows: Sequence[str], columns: Sequence[str], *, upright: bool = False) -> None:
    """Names of rows and columns; of many, every n-th."""
    crowded = max(len(rows), len(columns)) > NUMBERED
    step = math.ceil(len(columns) / 30)
    ticks = [index + 0.5 for index in range(0, len(columns), step)]
    names = [label(name, 22) for name in columns[::step]]
    if upright:
        axes.set_xticks(ticks, names)
    else:
        turned = 90 if len(columns) > NUMBERED else 40
        axes.set_xticks(ticks, names, rotation=turned, ha="right", va="center", rotation_mode="anchor")
    step = math.ceil(len(rows) / 40)
    axes.set_yticks([index + 0.5 for index in range(0, len(rows), step)], [label(name, 14) for name in rows[::step]])
    axes.tick_params(labelsize=7 if crowded else 9)


def _colour_key(axes: "Axes", low: float, high: float, shade: Shade, text: str) -> None:
    """A strip beside `axes` with the value of each shade."""
    from matplotlib.patches import Rectangle

    key = axes.inset_axes((1.06, 0, 0.06, 1))
    steps = 20
    height = (high - low) / steps
    for index in range(steps):
        bottom = low + index * height
        key.add_patch(Rectangle((0, bottom), 1, height, linewidth=0, facecolor=shade(bottom + height / 2)))
    key.set(xlim=(0, 1), ylim=(low, high), xticks=[])
    key.yaxis.tick_right()
    key.yaxis.set_label_position("right")
    key.set_ylabel(text)
    for side in ("top", "right"):
        key.spines[side].set_visible(True)
