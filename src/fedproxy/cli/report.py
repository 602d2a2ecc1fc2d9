"""fedproxy report."""

from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import Json, console, print_json

EXAMPLE = "fedproxy report runs/first runs/second"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run directories; or one comparison, the directory of `fedproxy compare` or its compare.json."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The page that compares several runs, comparison.html if not given; or that of a comparison, "
            "report.html beside its compare.json if not given.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write report.html, one self-contained page, into each run directory, and a page that compares several."""
    from fedproxy.errors import UsageError
    from fedproxy.reporting import compare_runs, is_comparison, report_comparison
    from fedproxy.reporting import report as write_report

    comparisons, page = [path for path in runs if is_comparison(path)], None
    if comparisons and len(runs) > 1:
        raise UsageError(f"{comparisons[0]} is a comparison of methods, which has a page of its own: give it alone.")
    if comparisons:
        pages = [report_comparison(comparisons[0], out)]
    else:
        pages = [write_report(run) for run in runs]
        page = compare_runs(runs, out or "comparison.html") if len(runs) > 1 else None
    if json:
        print_json({"reports": pages} | ({"comparison": page} if page else {}))
        return
    for written in pages:
        console().print(f"Report: {written}")
    if page:
        console().print(f"Comparison: {page}")
