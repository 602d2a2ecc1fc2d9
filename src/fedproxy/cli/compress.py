"""fedproxy compress."""

from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import Json, Overwrite, console, print_json, stage

EXAMPLE = "fedproxy compress ./llm ./proxy --remove 0.5 --calibration public.txt"


def compress(
    llm: Annotated[str, typer.Argument(help="The LLM: a checkpoint directory or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to write the proxy to.")],
    calibration: Annotated[Path, typer.Option(help="Public text: .txt with blank lines between documents, or .jsonl.")],
    remove: Annotated[float, typer.Option(help="Share of the blocks to remove.")] = 0.5,
    score: Annotated[str, typer.Option(help="How blocks are scored.")] = "block-influence",
    samples: Annotated[int, typer.Option(help="Documents to score on.", min=1)] = 512,
    max_length: Annotated[int, typer.Option(help="Tokens of a document at most.", min=2)] = 512,
    batch_size: Annotated[int, typer.Option(help="Documents in one forward pass.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the draw of documents.", min=0)] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Remove the blocks of an LLM that matter least, and write the rest as its proxy."""
    from fedproxy.pipeline import compress as compress_llm

    with stage("compress") as show:
        proxy = compress_llm(
            llm,
            out,
            remove=remove,
            calibration=calibration,
            score=score,
            samples=samples,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            overwrite=overwrite,
            on_progress=show,
        )
    if json:
        print_json({"path": proxy.path, "layer_map": proxy.layer_map, "scores": proxy.scores})
    else:
        console().print(
            f"Proxy in {proxy.path}: keeps {len(proxy.layer_map)} of {len(proxy.scores)} blocks {proxy.layer_map}."
        )
