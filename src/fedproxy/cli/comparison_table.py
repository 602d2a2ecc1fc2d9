"""The table of a comparison, which fills while the cells are run."""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from fedproxy.cli.output import live

_LOOK_SECONDS = 0.25
_COLUMNS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "accuracy": lambda cell: cell["accuracy"]["average"],
    "proxy tuned": lambda cell: cell["proxy_tuned"] and cell["proxy_tuned"]["average"],
    "worst client": lambda cell: cell["worst"]["accuracy"],
    "exposed": lambda cell: cell["exposed"],
    "MB up": lambda cell: cell["bytes_up"] / 1e6,
    "MB down": lambda cell: (cell["bytes_down"] + cell["proxy_bytes"]) / 1e6,
    "GFLOPs, clients": lambda cell: cell["flops"]["clients"] / 1e9,
    "minutes": lambda cell: sum(value or 0.0 for value in cell["seconds"].values()) / 60,
}
_WIDTHS = {"accuracy": len("0.000 (0.000–0.000)")}
_FIRST = len("┃ centralized-proxy ┃ removed ┃ seeds ┃")
_SHARES = ("accuracy", "proxy tuned", "worst client", "exposed")

Key = tuple[str, int, float]


def table(keys: Sequence[Key], cells: Sequence[Mapping[str, Any]], width: int, doing: str = "") -> Table:
    """Means over the seeds that are there; for the accuracy, with lowest and highest. What does not fit is left out.

    Args:
        keys: Method, seed and ratio of every cell.
        cells: The records of those that are done.
        width: Characters of a line.
        doing: What is being done.
    """
    ends = itertools.accumulate((_WIDTHS.get(name, len(name)) + 3 for name in _COLUMNS), initial=_FIRST)
    columns = [name for name, end in zip(_COLUMNS, [*ends][1:], strict=True) if end <= width]
    shown = Table(title=doing or None, title_justify="left")
    for name in ("method", "removed", "seeds", *columns):
        shown.add_column(name, no_wrap=True)
    for method, remove in dict.fromkeys((method, remove) for method, _, remove in keys):
        seeds = sum((method, remove) == (key[0], key[2]) for key in keys)
        done = [cell for cell in cells if (cell["method"], cell["remove"]) == (method, remove)]
        values = {name: _values(name, done) for name in columns}
        shown.add_row(
            method, f"{remove:.0%}", f"{len(done)}/{seeds}", *(_shown(name, found) for name, found in values.items())
        )
    return shown


def _values(name: str, cells: Sequence[Mapping[str, Any]]) -> list[float]:
    """What the cells that have it say in a column."""
    return [value for cell in cells if (value := _COLUMNS[name](cell)) is not None]


def _shown(name: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    if name not in _SHARES:
        return f"{mean:.3g}"
    spread = f" ({min(values):.3f}–{max(values):.3f})" if name == "accuracy" and len(values) > 1 else ""
    return f"{mean:.3f}{spread}"


def differences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each difference; "better" and "worse" only as of `metrics.verdict`."""
    words = {"better": "better than", "worse": "worse than", "undecided": "not told apart from"}
    return [
        f"{row['method']} at {row['remove']:.0%} is {words[row['verdict']]} {row['against']}: {row['mean']:+.3f} "
        f"[{row['low']:+.3f}, {row['high']:+.3f}], {len(row['by_seed'])} seeds"
        for row in found
    ]


@contextlib.contextmanager
def comparison_table(
    keys: Sequence[Key],
) -> Iterator[tuple[Callable[[Key, str, float, str], None], Callable[[dict[str, Any]], None]]]:
    """Show a table that fills, on a terminal; elsewhere a line for each cell.

    Yields:
        What is to be told of progress (cell, stage, fraction, text), and of each cell's record.
    """
    cells, doing = list[dict[str, Any]](), dict[Key, str]()
    looked, began = 0.0, None
    with live() as shown:

        def show(key: Key, stage: str, fraction: float, text: str) -> None:
            nonlocal looked, began
            doing[key] = f"{key[0]}, seed {key[1]} · {stage} {fraction:.0%} · {text}"
            began = began or (time.monotonic(), len(cells))
            if shown.console.is_terminal and time.monotonic() - looked >= _LOOK_SECONDS:
                looked = time.monotonic()
                title = "\n".join([reached(), *doing.values()])
                shown.update(table(keys, cells, shown.console.width, title), refresh=True)

        def reached() -> str:
            passed, made = (time.monotonic() - began[0], len(cells) - began[1]) if began else (0.0, 0)
            if not any("federate" in cell["seconds"] for cell in cells[-made:]):
                made = 0  # a cell that trains nothing says little of those that do
            return f"{len(cells)} of {len(keys)} cells{time_left(passed, made, len(keys) - len(cells))}"

        def done(cell: dict[str, Any]) -> None:
            cells.append(cell)
            doing.pop((cell["method"], cell["seed"], cell["remove"]), None)
            if not shown.console.is_terminal:
                mean = _shown("accuracy", _values("accuracy", [cell]))
                which = f"{cell['method']}, seed {cell['seed']}, {cell['remove']:.0%} removed"
                shown.console.print(f"{reached()} · {which}: {mean}", soft_wrap=True)

        yield show, done


def time_left(seconds: float, done: int, left: int) -> str:
    """The time that is left, if the cells to come take as long as those done since the command began; "" if none is."""
    return f" · about {math.ceil(seconds / done * left / 60)} min left" if done else ""
