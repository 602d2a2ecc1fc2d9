"""A comparison of methods as one self-contained HTML page, made of its compare.json alone."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedproxy.artifacts import inside
from fedproxy.config import to_toml
from fedproxy.methods import CENTRALIZED, FEDPROXY, ZERO_SHOT
from fedproxy.records import Cell, Difference
from fedproxy.reporting import heat_maps, plots
from fedproxy.reporting.conflict import Conflict
from fedproxy.reporting.html import Column, column_of, fill, write_page
from fedproxy.reporting.methods_summary import in_words, interval, percent_short, sentences
from fedproxy.reporting.page import compared_rounds, grouped, pins
from fedproxy.reporting.rows import Compared, Row
from fedproxy.reporting.svg import drawing
from fedproxy.reporting.units import duration, operations, percent, points, size
from fedproxy.typed_json import read_record

FILE = "compare.json"
_COMMIT = re.compile("[0-9a-f]{7,64}(-dirty)?")
_NAMED = (FEDPROXY, CENTRALIZED, ZERO_SHOT)
_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def is_comparison(path: Path | str) -> bool:
    """Whether a path is given as a comparison: its folder, or its compare.json wherever that lies."""
    return Path(path).is_file() or (Path(path) / FILE).is_file()


def report_comparison(path: Path | str, out: Path | str | None = None) -> Path:
    """Write the page of a comparison from its compare.json; no other file is read.

    Args:
        path: The comparison's folder, or a compare.json.
        out: The page; report.html beside compare.json if not given.

    Returns:
        The page's path.

    Raises:
        ArtifactError: compare.json is missing or damaged, or a link that leads out of the folder.
        MissingExtraError: the extra `report` is not installed.
        UsageError: the page cannot be written.
    """
    file = Path(path) if Path(path).is_file() else inside(Path(path), FILE)
    html = render_methods(read_record(file, Compared))
    page = file.with_name("report.html") if out is None else Path(out)
    write_page(page, html)
    return page


def render_methods(found: Compared) -> str:
    """The page.

    Raises:
        MissingExtraError: the extra `report` is not installed.
    """
    figures = _figures(found)
    sections = {
        "Summary": True,
        "Results": True,
        "Trade-offs": "exposed" in figures or "bytes" in figures,
        "Differences": bool(found.differences),
        "Cost": bool(figures.keys() & {"flops", "travelled", "seconds"}),
        "Rounds": True,
        "Settings": True,
        "Reproduce": True,
    }
    return fill(
        "methods.html.j2",
        title=f"{found.name}: {len({row.method for row in found.rows})} methods compared",
        contents=[name for name, there in sections.items() if there],
        comparison=found,
        sentences=sentences(found),
        facts=_facts(found),
        columns=_columns(found),
        own=FEDPROXY,
        figures=figures,
        forests=_forests(found),
        differences=[(each, in_words(each), interval(each), _by_seed(each)) for each in found.differences],
        several_ratios=len(found.ratios) > 1,
        short=percent_short,
        federations=_federations(found),
        axes=list(dict.fromkeys(axis for choices in found.methods.values() for axis in choices)),
        settings=grouped(found.experiment),
        environment=grouped(found.environment),
        toml=to_toml(found.experiment | {"compare": found.compare}) if found.experiment else "",
        commit=found.commit if _COMMIT.fullmatch(found.commit) else "",
        pins=pins(found.environment),
    )


def _facts(found: Compared) -> list[tuple[str, str]]:
    """The figures that are asked for first: number and what it is."""
    remove = found.ratios[0]
    said = []
    for method in (FEDPROXY, "fedavg", CENTRALIZED, "zero-shot"):
        row = found.row(method, remove)
        if row is not None:
            said.append((f"{percent(row.accuracy.mean)} %", row.label))
    row = found.row(FEDPROXY, remove)
    if row is not None and (gap := row.mean("gap_closed")) is not None:
        said.append((f"{percent(gap)} %", f"of the gap closed by {row.label}"))
    if row is not None and (exposed := row.mean("exposed")) is not None:
        said.append((f"{percent(exposed)} %", f"of the LLM exposed by {row.label}"))
    return said


def _columns(found: Compared) -> list[Column]:
    """Accuracy first, then what it cost; columns without a value in any row are left out."""

    def column(title: str, value: Callable[[Row], float | None], show: Callable[[float | None], str]) -> Column:
        return column_of(title, found.rows, value, show)

    def mean(quantity: str) -> Callable[[Row], float | None]:
        return lambda row: row.mean(quantity)

    columns = [
        column("Blocks removed (%)", lambda row: row.remove, lambda value: percent_short(value or 0.0)),
        ("Accuracy (%)", [(row.accuracy.mean, _spread_text(row)) for row in found.rows]),
        column("Gap closed (%)", mean("gap_closed"), percent),
        column("Worst client’s task (%)", mean("worst.accuracy"), percent),
        column("Tuned proxy (%)", mean("proxy_tuned.average"), percent),
        column("Exposed (%)", mean("exposed"), percent),
        column("Sent up", mean("bytes_up"), size),
        column("Sent down", mean("bytes_down"), size),
        column("Proxy", mean("proxy_bytes"), size),
        column("FLOP, clients", mean("flops.clients"), _operations),
        column("FLOP, server", mean("flops.server"), _operations),
        column("Memory, clients", mean("peak_memory_bytes.clients"), size),
        column("Memory, server", mean("peak_memory_bytes.server"), size),
        column("Time", lambda row: sum(row.seconds.values()) or None, duration),
    ]
    several = columns if len(found.ratios) > 1 else columns[1:]
    return [(title, cells) for title, cells in several if any(value is not None for value, _ in cells)]


def _operations(number: float | None) -> str:
    return operations(number).removesuffix("FLOP").strip()


def _spread_text(row: Row) -> str:
    spread = row.accuracy
    if len(row.cells) == 1:
        return percent(spread.mean)
    return f"{percent(spread.mean)} ({percent(spread.low)}–{percent(spread.high)})"


def _by_seed(found: Difference) -> str:
    return ", ".join(points(value).removesuffix(" points") for value in found.by_seed)


def _scale(values: Sequence[float]) -> tuple[float, str]:
    """The unit in which the largest of `values` is best read: its size, and its prefix."""
    most = max(values, default=0.0)
    return next(((unit, prefix) for unit, prefix in _UNITS if most >= unit), _UNITS[-1])


def _figures(found: Compared) -> dict[str, str]:
    drawn: dict[str, str] = {}
    exposed = [(row, 100 * share) for row in found.rows if (share := row.mean("exposed")) is not None]
    sent = [(row, row.travelled) for row in found.rows if row.travelled is not None]
    unit, prefix = _scale([sum(parts.values()) for _, parts in sent])
    travelled = [(row, sum(parts.values()) / unit) for row, parts in sent]
    with drawing():
        for name, costs, title, axis in (
            ("exposed", exposed, "Accuracy against exposure", "share of the LLM's parameters exposed (%)"),
            ("bytes", travelled, "Accuracy against traffic", f"sent up, down and as proxy ({prefix}B)"),
        ):
            if len(costs) > 1:
                marks = [
                    plots.Mark(row.label, cost, row.accuracy, row.method == FEDPROXY, row.method in _NAMED)
                    for row, cost in costs
                ]
                drawn[name] = plots.trade_off(marks, name=name, title=title, axis=axis, score="accuracy (%)")
        drawn |= _costs(found, sent)
        rows = [row for row in sorted(found.rows, key=lambda row: row.method != FEDPROXY) if row.losses]
        if rows:
            drawn["losses"] = plots.lines(
                {row.label: row.losses for row in rows},
                name="losses",
                title="Training loss by round, mean of clients and seeds",
                axis="loss (nats a token)",
                each="a method each",
                own=[row.label for row in rows if row.method == FEDPROXY],
            )
    return drawn


def _costs(found: Compared, sent: Sequence[tuple[Row, dict[str, float]]]) -> dict[str, str]:
    drawn = {}
    worked = [
        (row, {"clients": clients, "server": server})
        for row in found.rows
        if (clients := row.mean("flops.clients")) is not None and (server := row.mean("flops.server")) is not None
    ]
    timed = [(row, row.seconds) for row in found.rows if row.seconds]
    for name, rows, title, axis, show, base in (
        ("flops", worked, "Computation", "operations ({}FLOP)", operations, None),
        ("travelled", sent, "Traffic", "sent ({}B)", size, None),
        ("seconds", timed, "Time by stage", "wall-clock time (s)", duration, (1.0, "")),
    ):
        totals = [sum(parts.values()) for _, parts in rows]
        if not any(totals):
            continue
        unit, prefix = base or _scale(totals)
        keys = list(dict.fromkeys(key for _, parts in rows for key in parts))
        drawn[name] = plots.bars(
            [row.label for row, _ in rows],
            {key: [parts.get(key, 0.0) / unit for _, parts in rows] for key in keys},
            [show(total) for total in totals],
            name=name,
            title=title,
            axis=axis.format(prefix),
        )
    return drawn


def _forests(found: Compared) -> list[str]:
    """A forest plot for each method that others are compared with, at each ratio."""
    drawn: list[str] = []
    with drawing():
        for against, remove in dict.fromkeys((each.against, each.remove) for each in found.differences):
            chosen = [each for each in found.differences if (each.against, each.remove) == (against, remove)]
            where = f", {percent_short(remove)} % removed" if len(found.ratios) > 1 else ""
            title = f"Difference from {against}{where}"
            drawn.append(plots.forest(chosen, name=f"forest{len(drawn)}", title=title))
    return drawn


def _federations(found: Compared) -> list[dict[str, Any]]:
    """FedProxy's at every ratio first, then the others' at the first ratio; one that several methods share, once."""
    rows = sorted(found.rows, key=lambda row: row.method != FEDPROXY)
    chosen: dict[Any, tuple[list[str], Cell]] = {}
    for row in rows:
        cell = min(row.cells, key=lambda cell: cell.seed)
        if cell.rounds and (row.method == FEDPROXY or row.remove == found.ratios[0]):
            titles, _ = chosen.setdefault(cell.trainings or row.label, ([], cell))
            titles.append(row.label)
    first = next((cell for _, cell in chosen.values()), None)
    with drawing():
        return [
            _federation(found, titles, cell, index, first if cell is not first else None)
            for index, (titles, cell) in enumerate(chosen.values())
        ]


def _federation(found: Compared, titles: list[str], cell: Cell, index: int, model: Cell | None) -> dict[str, Any]:
    """One federation; what its figures would repeat of `model`'s is left out."""
    score = found.methods.get(cell.method, {}).get("score", "experiment")
    compress = found.experiment.get("compress")
    shared = compress.get("score") if isinstance(compress, dict) else None
    chosen = shared if score == "experiment" else score
    prefix, compared = f"federation{index}-", compared_rounds(cell.rounds)
    conflicts = [Conflict(each.number, {}, each.conflict) for each in cell.rounds if each.conflict]
    figures: dict[str, Any] = {}
    if plots.has(cell.rounds, "loss"):
        figures["loss"] = plots.by_round(cell.rounds, "loss", prefix=prefix)
    if compared:
        shown = compared if cell.method == FEDPROXY else compared[-1:]
        figures |= heat_maps.similarities(shown, prefix=prefix)
    if conflicts:
        figures["conflict_blocks"] = heat_maps.conflict_by_block(conflicts, prefix=prefix)
    if cell.proxy.scores and (model is None or model.proxy != cell.proxy):
        figures["blocks"] = plots.blocks(cell.proxy, chosen if isinstance(chosen, str) else "score", prefix=prefix)
    return {
        "titles": titles,
        "cell": cell,
        "conflicts": conflicts,
        "compared": compared[-1] if compared else None,
        "figures": figures,
        "first": model is None,
    }
