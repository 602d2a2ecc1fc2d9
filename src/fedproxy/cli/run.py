"""fedproxy run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedproxy.cli.live import live_page
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
    progress,
)
from fedproxy.cli.rounds_table import rounds_table
from fedproxy.cli.sheets import print_sheet

EXAMPLE = "fedproxy run experiment.toml --out runs/first"


def run(
    experiment: Annotated[Path, typer.Argument(help="The experiment file (TOML).")],
    out: OutUnlessDry = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    tflops: Tflops = None,
    json: Json = False,
) -> None:
    """The whole job: compress, federate, fuse, evaluate, report."""
    if dry_run:
        from fedproxy.cli.forecast_sheet import forecast

        forecast(experiment, tflops, compare=False, json=json)
        return
    execute(experiment, needed(out), resume=resume, overwrite=overwrite, json=json)


def execute(experiment: Path, out: Path, *, resume: bool, overwrite: bool, json: bool) -> dict[str, Any]:
    """Run an experiment with its progress on stderr, and print what came of it."""
    from fedproxy import pipeline, reporting
    from fedproxy.records import Results
    from fedproxy.typed_json import as_record

    with progress() as show, live_page(out) as begin, rounds_table(out, resume=resume, bars=True) as update:

        def on_progress(stage: str, fraction: float, text: str) -> None:
            begin()
            show(stage, fraction, text)
            update()

        results = pipeline.run(
            experiment, out, resume=resume, overwrite=overwrite, on_progress=on_progress, on_sheet=print_sheet
        )
    page = page_of(out, reporting.report)
    if json:
        print_json(results)
        return results
    terminal = console()
    terminal.print()
    if results["evaluation"]:
        terminal.print(reporting.results_table(results))
    if (validation := reporting.validation_table(results)) is not None:
        terminal.print(validation)
    terminal.print(reporting.totals_table(results))
    if (held := reporting.hindrances_table(results)) is not None:
        terminal.print(held)
    terminal.print(f"Tuned LLM: {results['llm']['path']} with the adapter {out / 'fused'}", soft_wrap=True)
    if use := reporting.use_it(as_record(results, Results, "results"), out):
        terminal.print(f"\nUse it:\n\n{use}\n", soft_wrap=True)
    terminal.print(f"Artifacts: {out}", soft_wrap=True)
    if page is not None:
        terminal.print(f"Report:    {page}", soft_wrap=True)
    return results
