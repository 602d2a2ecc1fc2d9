"""fedproxy demo."""

from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import Json, Overwrite, Resume, console

EXAMPLE = "fedproxy demo --out runs/demo"


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")] = Path("runs/demo"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """The whole job on the bundled small LLM and four clients' data, in a few minutes and without a network."""
    from fedproxy.cli.run import execute
    from fedproxy.demo import EXPERIMENT

    console().print(
        "A small LLM loses half its blocks; four clients with four different tasks tune what is left, each on its own "
        "data;\nwhat they learned is merged and plugged back into the LLM. Experiment: " + str(EXPERIMENT),
        soft_wrap=True,
    )
    execute(EXPERIMENT, out, resume=resume, overwrite=overwrite, json=json)
