"""fedproxy merge."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedproxy.cli.output import Json, Overwrite, tell
from fedproxy.errors import UsageError

EXAMPLE = "fedproxy merge bank.safetensors shop.safetensors --rule h-ties --out merged.safetensors"


def merge(
    updates: Annotated[list[Path], typer.Argument(help="The clients' updates (trained minus global), safetensors.")],
    out: Annotated[Path, typer.Option("--out", help="File to write the merged update to.")],
    rule: Annotated[
        str, typer.Option(help="mean, mean-rescaled, ties, h-ties, median, trimmed-mean, or an installed one.")
    ] = "h-ties",
    conflict_out: Annotated[Path | None, typer.Option(help="File to write each coordinate's conflict to.")] = None,
    rows: Annotated[str | None, typer.Option(help="The clients' row counts for mean, as in 100,250.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="An option of the rule, key=value; can be repeated.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Merge clients' updates that lie in files; memory stays flat."""
    from fedproxy.federation.merge_files import merge_files

    try:
        counts = None if rows is None else [int(part) for part in rows.split(",")]
    except ValueError as error:
        raise UsageError(f"--rows {rows!r}: write whole numbers separated by commas, one for each update.") from error
    options: dict[str, Any] = {}
    for pair in option or []:
        key, found, value = pair.partition("=")
        if not found:
            raise UsageError(f"--option {pair!r}: write it as key=value, for example rho=1.1.")
        try:
            options[key] = float(value)
        except ValueError:
            options[key] = value
    analysis = merge_files(
        updates, out, rule, conflict_out, overwrite=overwrite, rows=counts, names=[p.stem for p in updates], **options
    )
    weights = ", ".join(f"{weight:.3f}" for weight in analysis.weights or ()) or "none"
    tell(
        analysis.as_dict(),
        f"{analysis.clients} updates of {analysis.parameters:,} parameters merged into {out}; mean conflict "
        f"{analysis.conflict_mean:.3f}, zero {analysis.zero_fraction:.1%}, weights {weights}",
        json=json,
    )
