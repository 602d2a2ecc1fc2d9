"""fedproxy log."""

from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import Json, console, print_json

EXAMPLE = "fedproxy log runs/first"


def log(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run directory of `fedproxy serve`.")],
    json: Json = False,
) -> None:
    """Show a served run's audit log, and verify that nothing within it was changed, put in or taken out."""
    from fedproxy.deployment.audit import AUDIT, check

    if json:
        print_json({"events": list(check(run / AUDIT))})
        return
    count, last = 0, "none"
    for count, event in enumerate(check(run / AUDIT), 1):  # noqa: B007
        last = event.pop("sha256")
        shown = [str(event.pop(key, "")) for key in ("time", "event", "client")]
        rest = [f"{key}: {value}" for key, value in event.items() if key != "before"]
        console().print(f"{shown[0][:19]}  {shown[1]:12} {shown[2]:12} {', '.join(rest)}".rstrip(), soft_wrap=True)
    console().print(f"{count} lines, each of which follows from the one before. SHA-256 of the last: {last}")
