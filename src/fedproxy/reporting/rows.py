"""A comparison's compare.json as the rows of its page: a method at a ratio each, with means over the seeds."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import TypeVar

from fedproxy.records import Cell, Comparison, Difference

K = TypeVar("K")


@dataclass(frozen=True)
class Spread:
    """The mean of a quantity over the seeds, its lowest and highest value."""

    mean: float
    low: float
    high: float


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(statistics.fmean(values), min(values), max(values)) if values else None


@dataclass(frozen=True)
class Row:
    """One method at one ratio, with all its seeds.

    Attributes:
        method: Its name.
        remove: Share of blocks removed.
        label: What it is called beside the other rows.
        cells: One a seed.
        copies: How many parties get the proxy; None if it is not known.
    """

    method: str
    remove: float
    label: str
    cells: list[Cell]
    copies: int | None

    def spread(self, quantity: str) -> Spread | None:
        """A quantity by its place in a cell, as "flops.server", over the seeds; None if no cell has it."""
        return _spread([value for value in map(attrgetter(quantity), self.cells) if value is not None])

    def mean(self, quantity: str) -> float | None:
        """Its mean over the seeds."""
        found = self.spread(quantity)
        return None if found is None else found.mean

    @cached_property
    def accuracy(self) -> Spread:
        """Mean accuracy over the tasks."""
        found = self.spread("accuracy.average")
        assert found is not None
        return found

    @cached_property
    def tasks(self) -> dict[str, Spread]:
        """Task → accuracy."""
        return {
            task: found
            for task, values in _gathered(cell.accuracy.tasks for cell in self.cells)
            if (found := _spread(values)) is not None
        }

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Stage → mean seconds of the cells that recorded it."""
        return {stage: statistics.fmean(values) for stage, values in _gathered(cell.seconds for cell in self.cells)}

    @cached_property
    def losses(self) -> dict[int, float]:
        """Round → mean loss over clients and seeds."""
        found = _gathered(
            {each.number: each.loss for each in cell.rounds if each.loss is not None} for cell in self.cells
        )
        return {number: sum(means) / len(means) for number, means in sorted(found)}

    @cached_property
    def travelled(self) -> dict[str, float] | None:
        """Bytes "up" and "down" of all clients and rounds, and of the "proxy" to all that get it; means."""
        up, down, proxy = (self.mean(name) for name in ("bytes_up", "bytes_down", "proxy_bytes"))
        if up is None or down is None or proxy is None or (proxy and self.copies is None):
            return None
        return {"up": up, "down": down, "proxy": proxy * (self.copies or 0)}


def _gathered(found: Iterable[Mapping[K, float]]) -> list[tuple[K, list[float]]]:
    """Key → its values in every mapping that has it."""
    values: dict[K, list[float]] = {}
    for each in found:
        for key, value in each.items():
            values.setdefault(key, []).append(value)
    return list(values.items())


class Compared(Comparison):
    """A comparison with its rows."""

    @cached_property
    def clients(self) -> int | None:
        """Their number; None if it is not known."""
        partition = self.experiment.get("partition")
        count = partition.get("clients") if isinstance(partition, dict) else None
        listed = self.experiment.get("client")
        return len(listed) if listed and isinstance(listed, list) else count if isinstance(count, int) else None

    @cached_property
    def rows(self) -> list[Row]:
        """A method at a ratio each, in the comparison's order."""
        found: dict[tuple[str, float], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault((cell.method, cell.remove), []).append(cell)
        return [self._row(*key, cells) for key, cells in found.items()]

    def _row(self, method: str, remove: float, cells: list[Cell]) -> Row:
        label = method if len(self.ratios) == 1 else f"{method} {100 * remove:g} %"
        copies = self.clients if self.methods.get(method, {}).get("data") in ("each", "clients") else 1
        return Row(method, remove, label, cells, copies)

    @cached_property
    def seeds(self) -> list[int]:
        """Every seed."""
        return sorted({cell.seed for cell in self.cells})

    @cached_property
    def ratios(self) -> list[float]:
        """Every ratio, in the comparison's order."""
        return list(dict.fromkeys(cell.remove for cell in self.cells))

    @cached_property
    def tasks(self) -> list[str]:
        """Every task."""
        return list(dict.fromkeys(task for row in self.rows for task in row.tasks))

    def row(self, method: str, remove: float) -> Row | None:
        """The row of a method at a ratio, if there is one."""
        return next((row for row in self.rows if (row.method, row.remove) == (method, remove)), None)

    def difference(self, method: str, against: str, remove: float) -> Difference | None:
        """The difference between two methods, whichever way round it was recorded."""
        both = (each for found in self.differences for each in (found, found.turned))
        wanted = (method, against, remove)
        return next((each for each in both if (each.method, each.against, each.remove) == wanted), None)
