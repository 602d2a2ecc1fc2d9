"""fedproxy compare."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedproxy.cli.output import Json, Out, Overwrite, Resume, console, print_json, sheet

EXAMPLE = "fedproxy compare experiment.toml --out runs/comparison"


def compare(
    experiment: Annotated[Path, typer.Argument(help="The experiment file (TOML), with a table [compare].")],
    out: Out,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Run several methods with several seeds on the same work, and set them side by side in one table."""
    from fedproxy.cli.comparison_table import comparison_table, differences, table
    from fedproxy.comparison import cells_of
    from fedproxy.comparison import compare as run_comparison
    from fedproxy.errors import MissingExtraError
    from fedproxy.pipeline import read_experiment, report_comparison

    read = read_experiment(experiment)
    keys = cells_of(read)
    with comparison_table(keys) as (on_progress, on_cell):
        result: dict[str, Any] = run_comparison(
            read, out, resume=resume, overwrite=overwrite, on_progress=on_progress, on_cell=on_cell
        )
    try:
        page: Path | None = report_comparison(out)
    except MissingExtraError as error:
        page = None
        console().print(f"No report.html: {error}", markup=False)
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
