"""fedproxy federate."""

from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import Json, Out, Overwrite, Resume, progress, tell_run
from fedproxy.cli.rounds_table import rounds_table
from fedproxy.cli.sheets import print_sheet
from fedproxy.errors import UsageError

EXAMPLE = "fedproxy federate experiment.toml --out runs/first"


def federate(
    experiment: Annotated[Path, typer.Argument(help="The experiment file (TOML).")],
    out: Out,
    engine: Annotated[
        str, typer.Option(help="inline: all clients in this process. simulation: Flower on this machine.")
    ] = "inline",
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Compress the LLM and tune its proxy with the clients' data, round by round."""
    from fedproxy.pipeline import federate as federate_experiment

    if engine == "deployment":
        raise UsageError(f"Clients elsewhere need an address and keys: fedproxy serve {experiment} --out {out} --help")
    with progress() as show, rounds_table(out, resume=resume, bars=True) as update:

        def on_progress(stage: str, fraction: float, text: str) -> None:
            show(stage, fraction, text)
            update()

        run = federate_experiment(
            experiment,
            out,
            engine=engine,
            resume=resume,
            overwrite=overwrite,
            on_progress=on_progress,
            on_sheet=print_sheet,
            on_poll=update,
        )
    tell_run(run, json=json)
