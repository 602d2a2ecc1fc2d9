"""fedproxy methods."""

import dataclasses

from fedproxy.cli.output import Json, print_json, sheet

EXAMPLE = "fedproxy methods"


def methods(json: Json = False) -> None:
    """List the methods that `compare` knows, with their choice on each axis and the paper."""
    from rich.table import Table

    from fedproxy.methods import METHODS

    if json:
        print_json({name: {**dataclasses.asdict(row), "axes": row.axes} for name, row in METHODS.items()})
        return
    table = Table("method", *next(iter(METHODS.values())).axes, "paper")
    for name, method in METHODS.items():
        table.add_row(name, *method.axes.values(), method.paper)
    sheet(stderr=False).print(table)
