"""fedproxy fuse."""

from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import Json, Overwrite, console, print_json

EXAMPLE = "fedproxy fuse ./llm runs/first/adapter ./tuned --as checkpoint"


def fuse(
    llm: Annotated[str, typer.Argument(help="The LLM that the proxy was made from.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter tuned on the proxy.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    form: Annotated[
        str, typer.Option("--as", help="adapter (PEFT adapter for the LLM) or checkpoint (merged weights).")
    ] = "adapter",
    scale: Annotated[float, typer.Option(help="Factor of the task vector.")] = 1.0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Plug what the proxy learned back into the LLM, without training."""
    from fedproxy.pipeline import fuse as fuse_adapter

    path = fuse_adapter(llm, adapter, out, form=form, scale=scale, overwrite=overwrite)
    if json:
        print_json({"path": path, "form": form, "scale": scale})
    else:
        console().print(f"The tuned LLM lies in {path} ({form}).")
