"""fedproxy ledger."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from fedproxy.cli.output import Json, console, numbers, print_json, sheet

EXAMPLE = "fedproxy ledger ~/.cache/fedproxy/proxies/clients/1f3c…/ledger.jsonl"


def ledger(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The ledger; `fedproxy join` says where it lies.")],
    json: Json = False,
) -> None:
    """Show what left this machine, and verify that nothing within the ledger was changed, put in or taken out."""
    from fedproxy.deployment.ledger import check

    if json:
        print_json({"lines": [{**record, "line_sha256": line} for record, line in check(file)]})
        return
    requests, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    count, last = 0, "none"
    for count, (record, last) in enumerate(check(file), 1):  # noqa: B007
        key = record["event"], record["to"]
        requests[key] += 1
        sizes[key] += record["bytes"]
        shown = f"{record['time'][:19]}  {record['event']:12} {record['bytes']:>10,} bytes  sha256 {record['sha256']}"
        console().print(f"{shown}  to {record['to']}  {record.get('request', '')}".rstrip(), soft_wrap=True)
    table = numbers("what", "to", "lines", "bytes")
    for (kind, to), found in sorted(requests.items()):
        table.add_row(kind, to, f"{found:,}", f"{sizes[kind, to]:,}")
    sheet(stderr=True).print(table)
    console().print(f"{count} lines, each of which follows from the one before. SHA-256 of the last: {last}")
