"""fedproxy report."""

from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import Json, console, print_json

EXAMPLE = "fedproxy report runs/first runs/second"


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[Path, typer.Option("--out", help="The page that compares the runs, if there are several.")] = Path(
        "comparison.html"
    ),
    json: Json = False,
) -> None:
    """Write report.html, one self-contained page, into each run directory, and a page that compares several."""
    from fedproxy.pipeline import compare_runs
    from fedproxy.pipeline import report as write_report

    pages = [write_report(run) for run in runs]
    comparison = compare_runs(runs, out) if len(runs) > 1 else None
    if json:
        print_json({"reports": pages} | ({"comparison": comparison} if comparison else {}))
        return
    for page in pages:
        console().print(f"Report: {page}")
    if comparison:
        console().print(f"Comparison: {comparison}")
