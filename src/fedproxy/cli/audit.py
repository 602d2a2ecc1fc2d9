"""fedproxy audit."""

from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import Json, console, page_of, print_json, progress, sheet
from fedproxy.errors import UsageError

EXAMPLE = "fedproxy audit runs/first --attack calibrated-loss"


def audit(
    run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    attack: Annotated[
        list[str] | None,
        typer.Option(help="An attack by name; can be repeated. All if none is given.", show_default=False),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="An option of an attack, ATTACK.key=value; can be repeated.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Attack what a run gives away, measure how well it works, and note it in attacks.json and the report."""
    from fedproxy import reporting
    from fedproxy.attack_records import ATTACKS_FILE
    from fedproxy.privacy.attacks.audit import audit as attack_run

    with progress() as show:
        record = attack_run(run, attack or (), options=_options(option or ()), on_progress=show)
    page = page_of(run, reporting.report) if (run / "results.json").is_file() else None
    if json:
        print_json(record)
        return
    for table in reporting.attack_tables(record):
        sheet(stderr=True).print(table)
    console().print(f"Figures: {run / ATTACKS_FILE}", soft_wrap=True)
    if page is not None:
        console().print(f"Report:  {page}", soft_wrap=True)


def _options(pairs: list[str] | tuple[str, ...]) -> dict[str, dict[str, object]]:
    """Attack → its options, from ATTACK.key=value.

    Raises:
        UsageError: one is not written like that.
    """
    found: dict[str, dict[str, object]] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        attack, dot, key = name.partition(".")
        if not (equals and dot):
            raise UsageError(f"--option {pair!r}: write it as ATTACK.key=value, for example calibrated-loss.rows=100.")
        try:
            found.setdefault(attack, {})[key] = float(value)
        except ValueError:
            found.setdefault(attack, {})[key] = value
    return found
