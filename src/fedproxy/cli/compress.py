"""fedproxy compress."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from fedproxy.cli.output import Json, Overwrite, TrustRemoteCode, console, print_json, stage, tell
from fedproxy.cli.sheets import print_sheet, show_plan

EXAMPLE = "fedproxy compress ./llm ./proxy --remove 0.5 --calibration public.txt"


def compress(
    llm: Annotated[str, typer.Argument(help="The LLM: a checkpoint directory or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to write the proxy to.")],
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Public text: .txt with blank lines between documents, or .jsonl. The scores magnitude, random and "
            "uniform do without."
        ),
    ] = None,
    remove: Annotated[float, typer.Option(help="Share of the blocks to remove.")] = 0.5,
    score: Annotated[
        str,
        typer.Option(
            help="How blocks are scored: angular-distance, block-influence, magnitude, perplexity, random or uniform."
        ),
    ] = "block-influence",
    keep_first: Annotated[int, typer.Option(help="Blocks at the beginning to keep in any case.", min=0)] = 0,
    keep_last: Annotated[int, typer.Option(help="Blocks at the end to keep in any case.", min=0)] = 0,
    samples: Annotated[int, typer.Option(help="Documents to score on.", min=1)] = 512,
    max_length: Annotated[int, typer.Option(help="Tokens of a document at most.", min=2)] = 512,
    batch_size: Annotated[int, typer.Option(help="Documents in one forward pass.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.", min=0)] = 0,
    placement: Annotated[
        str,
        typer.Option(help="Where the LLM is run: memory, stream (one block at a time from its files), or auto."),
    ] = "auto",
    heal_refit: Annotated[
        int,
        typer.Option(help="Public documents to fit the last linear layer before each gap on, in closed form.", min=0),
    ] = 0,
    heal_steps: Annotated[
        int, typer.Option(help="Steps in which the LLM teaches the proxy on public text.", min=0)
    ] = 0,
    heal_mode: Annotated[str, typer.Option(help="What healing trains: lora or full.")] = "lora",
    heal_text: Annotated[
        Path | None, typer.Option(help="Public text to heal on; the calibration text if none.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show scores and what each share removed would give; write nothing."),
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Remove the blocks of an LLM that matter least, and write the rest as its proxy."""
    settings: dict[str, Any] = {
        "remove": remove,
        "calibration": calibration,
        "score": score,
        "keep_first": keep_first,
        "keep_last": keep_last,
        "samples": samples,
        "max_length": max_length,
        "batch_size": batch_size,
        "seed": seed,
        "placement": placement,
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        from fedproxy.compression.plan import plan

        with stage("plan") as show:
            found = plan(llm, **settings, on_progress=show)
        if json:
            print_json(dataclasses.asdict(found))
        else:
            show_plan(console(), found)
        return
    from fedproxy.artifacts import Manifest
    from fedproxy.compression.compress import compress as compress_llm
    from fedproxy.compression.exposure import healed_perplexity
    from fedproxy.config import Heal
    from fedproxy.errors import UsageError

    if heal_mode not in ("lora", "full"):
        raise UsageError(f"--heal-mode {heal_mode!r}: choose lora or full.")
    text = "" if heal_text is None else str(heal_text)
    heal = Heal(refit=heal_refit, steps=heal_steps, mode=heal_mode, text=text)  # type: ignore[arg-type]
    sheets: list[dict[str, Any]] = []

    def on_sheet(sheet: dict[str, Any]) -> None:
        sheets.append(sheet)
        print_sheet(sheet)

    with stage("compress") as show:
        proxy = compress_llm(llm, out, **settings, heal=heal, overwrite=overwrite, on_progress=show, on_sheet=on_sheet)
    text = f"Proxy in {out}: keeps {len(proxy.layer_map)} of {len(proxy.scores)} blocks {proxy.layer_map}."
    if healed := healed_perplexity(Manifest.read(out).settings):
        llm_has, before, after = (f"{healed[who]:.4g}" for who in ("llm", "before", "after"))
        text += (
            f" Healed, its perplexity on public text held out is {after}; it was {before}, and the LLM's is {llm_has}."
        )
    record = {
        "path": out,
        "layer_map": proxy.layer_map,
        "scores": proxy.scores,
        "exposure": sheets[0],
        "healed": healed,
    }
    tell(record, text, json=json)
