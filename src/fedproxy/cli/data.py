"""fedproxy data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from fedproxy.cli.output import Json, TrustRemoteCode, console, print_json
from fedproxy.foreign import plain

EXAMPLE = "fedproxy data check bank.csv --model ./llm"
_SHOWN = 2000
"""Characters of a part of a row that are shown."""

app = typer.Typer(
    no_args_is_help=True, help="Look at rows before anything is trained on them.", epilog=f"Example: {EXAMPLE}"
)


@app.command(epilog=f"Example: {EXAMPLE}")
def check(
    file: Annotated[
        Path, typer.Argument(help="The rows: JSON Lines, .json, .csv, .tsv, .parquet, or a folder that datasets saved.")
    ],
    model: Annotated[str, typer.Option(help='The LLM that reads them, a directory, Hub id or "demo".')] = "",
    rows: Annotated[int, typer.Option(help="How many of the first rows are shown.", min=0)] = 3,
    max_length: Annotated[int, typer.Option(help="Tokens of a row at most, as in the experiment file.", min=2)] = 512,
    completion_only_loss: Annotated[bool, typer.Option(help="Only the last answer counts, or everything.")] = True,
    assistant_only_loss: Annotated[
        bool, typer.Option("--assistant-only-loss", help="All turns of the assistant count.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Show what of a file would be trained on: rows, tokens, duplicates, and the first rows with what counts."""
    from fedproxy.config import Train
    from fedproxy.demo import LLM, given_or_own
    from fedproxy.forecast import check_data

    train = Train(
        max_length=max_length, completion_only_loss=completion_only_loss, assistant_only_loss=assistant_only_loss
    )
    found = check_data(file, given_or_own(model, LLM) or None, train, first=rows, trust_remote_code=trust_remote_code)
    if json:
        print_json(found)
    else:
        _show(console(), found)


def _show(target: Console, found: Mapping[str, Any]) -> None:
    from fedproxy.reporting.units import count

    target.print(f"{found['file']}: {found['format']}, {count(found['rows'], 'row')} of the format {found['rows_of']}.")
    used, unused = ([n for n, column in found["columns"].items() if column["used"] is used] for used in (True, False))
    rest = f" Not trained on: {', '.join(unused)}." if unused else ""
    target.print(f"Columns: {', '.join(used)}.{rest}", soft_wrap=True)
    if found["duplicates"]:
        target.print(f"Duplicates of an earlier row: {found['duplicates']:,}.", style="yellow")
    if "tokens" in found:
        target.print(
            f"{found['tokens']:,} tokens an epoch, of which {found['counting']:,} count in the loss; "
            f"the longest row has {found['longest']:,}."
        )
        if found["cut"]:
            target.print(
                f"max_length = {found['max_length']} cuts {count(found['cut'], 'row')}: "
                "off the beginning of the prompt, then off the end.",
                style="yellow",
            )
        if found["lost"]:
            target.print(f"{count(found['lost'], 'row')} have no token to learn and are left out.", style="yellow")
    else:
        target.print("Give --model LLM to see tokens, and the rows as the model reads them.")
    if not found["first"]:
        return
    colours = target.color_system is not None
    target.print(f"What counts in the loss is {'green' if colours else 'in ⟦ ⟧'}.")
    for number, parts in enumerate(found["first"], 1):
        target.print(f"\nrow {number}", style="bold")
        target.print(_shown(parts, colours), soft_wrap=True)


def _shown(parts: Sequence[Mapping[str, Any]], colours: bool) -> Text:
    shown = Text()
    for part in parts:
        text = plain(part["text"], _SHOWN, lines=True)
        if part["counts"]:
            shown.append(text if colours else f"⟦{text}⟧", "green")
        else:
            shown.append(text, "dim")
    return shown
