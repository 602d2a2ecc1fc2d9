"""fedproxy methods."""

import dataclasses

from fedproxy.cli.output import Json, print_json, sheet

EXAMPLE = "fedproxy methods"


def methods(json: Json = False) -> None:
    """List the methods that `compare` knows, with their choice on each axis and the paper."""
    from rich.table import Column, Table
    from rich.text import Text

    from fedproxy.methods import METHODS

    if json:
        print_json({name: {**dataclasses.asdict(row), "axes": row.axes} for name, row in METHODS.items()})
        return
    table = Table(Column("method", no_wrap=True), "choices", "paper", show_lines=True)
    for name, method in METHODS.items():
        choices = ", ".join(f"{axis} {value}" for axis, value in method.axes.items() if value != "none")
        table.add_row(name, Text(choices), method.paper)
    sheet(stderr=False).print(table)
