"""fedproxy fuse."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedproxy.cli.output import Json, Overwrite, TrustRemoteCode, console, print_json, stage
from fedproxy.errors import UsageError

EXAMPLE = "fedproxy fuse ./llm runs/first/adapter ./tuned --as checkpoint"


def fuse(
    llm: Annotated[str, typer.Argument(help="The LLM that the proxy was made from.")],
    adapter: Annotated[
        Path, typer.Argument(help="The adapter tuned on the proxy, by fedproxy or (with --proxy) by PEFT or TRL.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    form: Annotated[
        str, typer.Option("--as", help="adapter (PEFT adapter for the LLM) or checkpoint (merged weights).")
    ] = "adapter",
    scale: Annotated[str, typer.Option(help="Factor of the task vector, or auto: by loss on --public.")] = "1.0",
    public: Annotated[
        Path | None, typer.Option(help="Public text for --scale auto; text unlike the tasks favours small scales.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Documents of the public text to use.", min=1)] = 64,
    max_length: Annotated[int, typer.Option(help="Tokens of a document at most.", min=2)] = 256,
    proxy: Annotated[
        Path | None,
        typer.Option(help="The proxy: for an adapter by PEFT or TRL, or biases and modules trained on a healed one."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Plug what the proxy learned back into the LLM, without training."""
    from fedproxy.artifacts import Manifest, read_json
    from fedproxy.fusion import AUTO, serving_note
    from fedproxy.fusion import fuse as fuse_adapter

    with stage("fuse") as show:
        path = fuse_adapter(
            llm,
            adapter,
            out,
            form=form,
            scale=scale if scale == AUTO else _number(scale),
            public=public,
            samples=samples,
            max_length=max_length,
            proxy=proxy,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            on_progress=show,
        )
    settings = Manifest.read(path).settings
    curve = settings.get("scale_curve")
    note = serving_note(read_json(path / "adapter_config.json")) if form == "adapter" else None
    if json:
        result = {"path": path, "form": form, "scale": settings["scale"], "scale_curve": curve, "note": note}
        print_json({name: value for name, value in result.items() if value is not None})
        return
    if curve is not None:
        console().print(_table(curve, settings["scale"]))
    console().print(f"The tuned LLM lies in {path} ({form}, scale {settings['scale']:g}).")
    if note is not None:
        console().print(note)


def _number(scale: str) -> float:
    try:
        return float(scale)
    except ValueError:
        raise UsageError(f"--scale must be a number or auto, got {scale!r}.") from None


def _table(curve: list[tuple[float, float | None]], chosen: float) -> Table:
    table = Table("scale", "nats per token", "", title="Loss on the public text")
    for scale, loss in curve:
        remark = "the LLM itself" if scale == 0 else "chosen" if scale == chosen else ""
        table.add_row(f"{scale:g}", "overflows" if loss is None else f"{loss:.4f}", remark)
    return table
