"""fedproxy compare."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedproxy.cli.output import (
    DryRun,
    Json,
    OutUnlessDry,
    Overwrite,
    Resume,
    Tflops,
    console,
    needed,
    page_of,
    print_json,
    sheet,
)

EXAMPLE = "fedproxy compare experiment.toml --out runs/comparison"


def compare(
    experiment: Annotated[Path, typer.Argument(help="The experiment file (TOML), with a table \\[compare].")],
    out: OutUnlessDry = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Cells to run at once; left out, as many as processors and memory allow."),
    ] = None,
    dry_run: DryRun = False,
    tflops: Tflops = None,
    json: Json = False,
) -> None:
    """Run several methods with several seeds on the same work, and set them side by side in one table."""
    if dry_run:
        from fedproxy.cli.forecast_sheet import forecast

        forecast(experiment, tflops, compare=True, json=json)
        return
    out = needed(out)
    from fedproxy.cli.comparison_table import comparison_table, differences, table
    from fedproxy.comparison import cells_of
    from fedproxy.comparison import compare as run_comparison
    from fedproxy.pipeline import read_experiment
    from fedproxy.reporting import report_comparison

    keys = cells_of(read_experiment(experiment))
    with comparison_table(keys) as (on_progress, on_cell):
        result: dict[str, Any] = run_comparison(
            experiment, out, resume=resume, overwrite=overwrite, jobs=jobs, on_progress=on_progress, on_cell=on_cell
        )
    page = page_of(out, report_comparison)
    if json:
        print_json(result)
        return
    terminal = sheet(stderr=True)
    terminal.print(table(keys, result["cells"], terminal.width))
    for line in differences(result["differences"]):
        console().print(line, soft_wrap=True)
    console().print(f"Everything: {out / 'compare.json'}", soft_wrap=True)
    if page is not None:
        console().print(f"Report:     {page}", soft_wrap=True)
