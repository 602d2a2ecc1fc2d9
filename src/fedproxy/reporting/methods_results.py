"""A comparison's `compare.json` as checked, typed values: what the page of a comparison is made of.

A cell without `rounds` (written by an earlier version, or of a method without a federation) has none here, too.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedproxy.artifacts import read_json
from fedproxy.errors import ArtifactError
from fedproxy.reporting.checked import Part, short
from fedproxy.reporting.conflict import Conflict
from fedproxy.reporting.results import Results
from fedproxy.reporting.results import parse as parse_results

FILE = "compare.json"
VERDICTS = ("better", "worse", "undecided")
QUANTITIES = {
    "accuracy": ("accuracy", "average"),
    "proxy_tuned": ("proxy_tuned", "average"),
    "gap_closed": ("gap_closed",),
    "worst": ("worst", "accuracy"),
    "exposed": ("exposed",),
    "bytes_up": ("bytes_up",),
    "bytes_down": ("bytes_down",),
    "proxy_bytes": ("proxy_bytes",),
    "flops_clients": ("flops", "clients"),
    "flops_server": ("flops", "server"),
    "memory_clients": ("peak_memory_bytes", "clients"),
    "memory_server": ("peak_memory_bytes", "server"),
}
"""Name → its place in a cell's record."""


@dataclass(frozen=True)
class Spread:
    """The mean of a quantity over the seeds, its lowest and highest value."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """One method with one seed at one ratio.

    Attributes:
        method: Its name.
        seed: Of the experiment.
        remove: Share of the LLM's blocks that the method removes, if it takes a proxy.
        tasks: Task → accuracy.
        left_out: Task → why it is in no mean and no difference.
        numbers: Key of `QUANTITIES` → value, of those that the cell has; always "accuracy".
        worst_task: The client's task with the lowest accuracy; empty if it was not recorded.
        seconds: Stage → seconds.
        trainings: Names of the trainings that it rests on; cells may share them.
        history: Its rounds and its proxy; empty if there was no federation.
        conflicts: Mean conflict by block, of rounds that have it.
    """

    method: str
    seed: int
    remove: float
    tasks: dict[str, float]
    left_out: dict[str, str]
    numbers: dict[str, float]
    worst_task: str
    seconds: dict[str, float]
    trainings: tuple[str, ...]
    history: Results
    conflicts: list[Conflict]


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

    def values(self, quantity: str) -> list[float]:
        """A quantity in every cell that has it."""
        return [cell.numbers[quantity] for cell in self.cells if quantity in cell.numbers]

    def spread(self, quantity: str) -> Spread | None:
        """A quantity over the seeds; None if no cell has it."""
        return _spread(self.values(quantity))

    def mean(self, quantity: str) -> float | None:
        """Its mean over the seeds."""
        found = self.spread(quantity)
        return None if found is None else found.mean

    @cached_property
    def accuracy(self) -> Spread:
        """Mean accuracy over the tasks."""
        found = self.spread("accuracy")
        assert found is not None
        return found

    @cached_property
    def tasks(self) -> dict[str, Spread]:
        """Task → accuracy."""
        names = dict.fromkeys(task for cell in self.cells for task in cell.tasks)
        spreads = {task: _spread([cell.tasks[task] for cell in self.cells if task in cell.tasks]) for task in names}
        return {task: found for task, found in spreads.items() if found is not None}

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Stage → mean seconds of the cells that recorded it."""
        names = dict.fromkeys(stage for cell in self.cells for stage in cell.seconds)
        return {
            stage: statistics.fmean([cell.seconds[stage] for cell in self.cells if stage in cell.seconds])
            for stage in names
        }

    @cached_property
    def travelled(self) -> dict[str, float] | None:
        """Bytes "up" and "down" of all clients and rounds, and of the "proxy" to all that get it; means."""
        up, down, proxy = (self.mean(name) for name in ("bytes_up", "bytes_down", "proxy_bytes"))
        if up is None or down is None or proxy is None or (proxy and self.copies is None):
            return None
        return {"up": up, "down": down, "proxy": proxy * (self.copies or 0)}


@dataclass(frozen=True)
class Difference:
    """How much more accurate `method` is than `against`, as a share of 1, with its interval.

    Attributes:
        method: The one.
        against: The other.
        remove: The ratio of both.
        mean: Over tasks and seeds.
        low, high: The interval's ends.
        level: Share of the bootstrap's samples within the interval.
        by_seed: The difference for each seed.
        verdict: "better" or "worse" if the interval excludes 0, else "undecided".
        tasks: The tasks that it is of.
    """

    method: str
    against: str
    remove: float
    mean: float
    low: float
    high: float
    level: float
    by_seed: list[float]
    verdict: str
    tasks: list[str]

    @property
    def turned(self) -> "Difference":
        """The same, seen from the other method."""
        verdict = {"better": "worse", "worse": "better"}.get(self.verdict, self.verdict)
        return Difference(
            self.against,
            self.method,
            self.remove,
            0.0 - self.mean,
            0.0 - self.high,
            0.0 - self.low,
            self.level,
            [0.0 - value for value in self.by_seed],
            verdict,
            self.tasks,
        )


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison recorded.

    Attributes:
        name: The experiment's name.
        rows: A method at a ratio each, in the comparison's order.
        differences: Paired differences.
        methods: Method → its choice on each axis, and "paper".
        clients: Their number; None if it is not known.
        flops: How operations were counted.
        commit: Of the repository; empty if there was none.
        compare, experiment, environment: As recorded.
    """

    name: str
    rows: list[Row]
    differences: list[Difference]
    methods: dict[str, dict[str, str]]
    clients: int | None
    flops: str
    commit: str
    compare: dict[str, Any]
    experiment: dict[str, Any]
    environment: dict[str, Any]

    @cached_property
    def seeds(self) -> list[int]:
        """Every seed."""
        return sorted({cell.seed for row in self.rows for cell in row.cells})

    @cached_property
    def ratios(self) -> list[float]:
        """Every ratio, in the comparison's order."""
        return list(dict.fromkeys(row.remove for row in self.rows))

    @cached_property
    def tasks(self) -> list[str]:
        """Every task."""
        return list(dict.fromkeys(task for row in self.rows for task in row.tasks))

    def row(self, method: str, remove: float) -> Row | None:
        """The row of a method at a ratio, if there is one."""
        return next((row for row in self.rows if (row.method, row.remove) == (method, remove)), None)

    def difference(self, method: str, against: str, remove: float) -> Difference | None:
        """The difference between two methods, whichever way round it was recorded."""
        for found in self.differences:
            if found.remove == remove and (found.method, found.against) == (method, against):
                return found
            if found.remove == remove and (found.against, found.method) == (method, against):
                return found.turned
        return None


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(statistics.fmean(values), min(values), max(values)) if values else None


def _number(part: Part, key: str) -> float:
    found = part.number(key)
    if found is None:
        raise ArtifactError(f"{part.place}.{key} is missing, expected a finite number.")
    return found


def _text(part: Part, key: str) -> str:
    found = part.text(key, "")
    if not found:
        raise ArtifactError(f"{part.place}.{key} is missing, expected a string.")
    return found


def _texts(part: Part, key: str) -> list[str]:
    found = part.items(key)
    if not all(isinstance(value, str) for value in found):
        raise ArtifactError(f"{part.place}.{key} is {short(found)}, expected a list of strings.")
    return found


def _numbers(part: Part) -> dict[str, float]:
    """The numbers of an object, without those that are null."""
    return {key: value for key in part.value if (value := part.number(key)) is not None}


def _quantities(part: Part) -> dict[str, float]:
    found = {}
    for name, path in QUANTITIES.items():
        place = part
        for key in path[:-1]:
            place = place.part(key)
        value = place.number(path[-1])
        if value is not None:
            found[name] = value
    return found


def _conflicts(part: Part) -> list[Conflict]:
    found = []
    for index, entry in enumerate(part.items("rounds")):
        round_ = Part(entry, f"{part.place}.rounds[{index}]")
        blocks = round_.part("conflict")
        wrong = [key for key in blocks.value if not (key.isascii() and key.isdigit() and len(key) < 10)]
        if wrong:
            raise ArtifactError(f"{blocks.place} has the key {short(wrong[0])}, expected the number of a block.")
        means = {int(key): value for key, value in _numbers(blocks).items()}
        if not all(0 <= value <= 1 for value in means.values()):
            raise ArtifactError(f"{blocks.place} is {short(blocks.value)}, expected values from 0 to 1.")
        if means:
            found.append(Conflict(round_.integer("round") or index + 1, {}, means))
    return found


def _cell(part: Part) -> Cell:
    accuracy = part.part("accuracy")
    left_out = accuracy.part("left_out")
    _number(accuracy, "average")
    history = {key: part.value.get(key) for key in ("rounds", "proxy")}
    return Cell(
        method=_text(part, "method"),
        seed=int(_number(part, "seed")),
        remove=_number(part, "remove"),
        tasks=_numbers(accuracy.part("tasks")),
        left_out={task: left_out.text(task, "") for task in left_out.value},
        numbers=_quantities(part),
        worst_task=part.part("worst").text("task", ""),
        seconds=_numbers(part.part("seconds")),
        trainings=tuple(_texts(part, "trainings")),
        history=parse_results(history, part.place),
        conflicts=_conflicts(part),
    )


def _difference(part: Part) -> Difference:
    low, high = _number(part, "low"), _number(part, "high")
    verdict, expected = _text(part, "verdict"), "better" if low > 0 else "worse" if high < 0 else "undecided"
    if verdict != expected:
        raise ArtifactError(
            f"{part.place}.verdict is {short(verdict)}, but of an interval from {low:g} to {high:g} it is {expected!r}."
        )
    level = part.number("level")
    return Difference(
        method=_text(part, "method"),
        against=_text(part, "against"),
        remove=_number(part, "remove"),
        mean=_number(part, "mean"),
        low=low,
        high=high,
        level=0.95 if level is None else level,
        by_seed=part.numbers("by_seed"),
        verdict=verdict,
        tasks=_texts(part, "tasks"),
    )


def _clients(experiment: Part) -> int | None:
    return len(experiment.items("client")) or experiment.part("partition").integer("clients")


def _check_tables(experiment: Part) -> None:
    for key, value in experiment.value.items():
        if isinstance(value, list) and not all(isinstance(entry, dict) for entry in value):
            raise ArtifactError(f"{experiment.place}.{key} is {short(value)}, expected tables.")


def parse(raw: Any, source: str = FILE) -> Comparison:
    """Check what a compare.json holds and give it types.

    Args:
        raw: What it holds.
        source: Its name in messages.

    Raises:
        ArtifactError: there is no cell, one is there twice, a part has the wrong type, or a verdict is not that of its
            interval.
    """
    part = Part(raw, source)
    cells = [_cell(Part(entry, f"{source}.cells[{index}]")) for index, entry in enumerate(part.items("cells"))]
    if not cells:
        raise ArtifactError(f"{source} holds no cell. Give the compare.json that `fedproxy compare` wrote.")
    keys = [(cell.method, cell.seed, cell.remove) for cell in cells]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ArtifactError(f"{source} has two cells of {short(twice[0])}, seed {twice[1]}, remove {twice[2]:g}.")
    experiment, methods = part.part("experiment"), part.part("methods")
    _check_tables(experiment)
    clients = _clients(experiment)
    axes = {
        name: {axis: methods.part(name).text(axis, "") for axis in methods.part(name).value} for name in methods.value
    }
    ratios = {cell.remove for cell in cells}

    def row(method: str, remove: float) -> Row:
        label = method if len(ratios) == 1 else f"{method} {100 * remove:g} %"
        copies = clients if axes.get(method, {}).get("data") in ("each", "clients") else 1
        found = [cell for cell in cells if (cell.method, cell.remove) == (method, remove)]
        return Row(method, remove, label, found, copies)

    return Comparison(
        name=part.text("name", "comparison"),
        rows=[row(*key) for key in dict.fromkeys((cell.method, cell.remove) for cell in cells)],
        differences=[
            _difference(Part(entry, f"{source}.differences[{index}]"))
            for index, entry in enumerate(part.items("differences"))
        ],
        methods=axes,
        clients=clients,
        flops=part.text("flops", ""),
        commit=part.text("commit", ""),
        compare=part.part("compare").value,
        experiment=experiment.value,
        environment=part.part("environment").value,
    )


def load(path: Path) -> Comparison:
    """Read a compare.json.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    return parse(read_json(path), str(path))
