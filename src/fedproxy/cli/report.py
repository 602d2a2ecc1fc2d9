"""fedproxy report."""

from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import Json, console, print_json

EXAMPLE = "fedproxy report runs/first"


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    json: Json = False,
) -> None:
    """Write report.html, one self-contained page, into each run directory."""
    from fedproxy.pipeline import report as write_report

    pages = [write_report(run) for run in runs]
    if json:
        print_json({"reports": pages})
    else:
        for page in pages:
            console().print(f"Report: {page}")
