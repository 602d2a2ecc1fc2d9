"""The table of a comparison, which fills while the cells are run."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.live import Live
from rich.table import Table

from fedproxy.cli.output import console

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
_SHARES = ("accuracy", "proxy tuned", "worst client", "exposed")

Key = tuple[str, int, float]


def table(keys: Sequence[Key], cells: Sequence[Mapping[str, Any]], doing: str = "") -> Table:
    """Means over the seeds that are there; for the accuracy, with lowest and highest.

    Args:
        keys: Method, seed and ratio of every cell.
        cells: The records of those that are done.
        doing: What is being done.
    """
    shown = Table("method", "removed", "seeds", *_COLUMNS, title=doing or None, title_justify="left")
    for method, remove in dict.fromkeys((method, remove) for method, _, remove in keys):
        seeds = sum((method, remove) == (key[0], key[2]) for key in keys)
        done = [cell for cell in cells if (cell["method"], cell["remove"]) == (method, remove)]
        values = {
            name: [value for cell in done if (value := read(cell)) is not None] for name, read in _COLUMNS.items()
        }
        shown.add_row(
            method, f"{remove:.0%}", f"{len(done)}/{seeds}", *(_shown(name, found) for name, found in values.items())
        )
    return shown


def _shown(name: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    if name not in _SHARES:
        return f"{mean:.3g}"
    spread = f" ({min(values):.3f}–{max(values):.3f})" if name == "accuracy" and len(values) > 1 else ""
    return f"{mean:.3f}{spread}"


def differences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each difference; "better" and "worse" only where the interval excludes 0."""
    words = {"better": "better than", "worse": "worse than", "undecided": "not told apart from"}
    return [
        f"{row['method']} at {row['remove']:.0%} is {words[row['verdict']]} {row['against']}: {row['mean']:+.3f} "
        f"[{row['low']:+.3f}, {row['high']:+.3f}], {len(row['by_seed'])} seeds"
        for row in found
    ]


@contextlib.contextmanager
def comparison_table(
    keys: Sequence[Key],
) -> Iterator[tuple[Callable[[str, float, str], None], Callable[[dict[str, Any]], None]]]:
    """Show a table that fills, on a terminal.

    Yields:
        What is to be told of progress (stage, fraction, text), and of each cell's record.
    """
    target, cells, looked = console(), list[dict[str, Any]](), 0.0
    with (
        Live(console=target, auto_refresh=False, transient=True)
        if target.is_terminal
        else contextlib.nullcontext() as live
    ):

        def show(stage: str, fraction: float, text: str) -> None:
            nonlocal looked
            if live is not None and time.monotonic() - looked >= _LOOK_SECONDS:
                looked = time.monotonic()
                doing = f"cell {len(cells) + 1} of {len(keys)} · {stage} {fraction:.0%} · {text}"
                live.update(table(keys, cells, doing), refresh=True)

        yield show, cells.append
