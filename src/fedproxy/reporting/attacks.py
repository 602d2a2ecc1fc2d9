"""What attacks on a run found, as terminal tables."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from fedproxy.attack_records import Attacks, Figure
from fedproxy.reporting.units import decimals
from fedproxy.typed_json import as_record


def interval(figure: Figure) -> str:
    """A figure's interval as people write it; a dash if it has none."""
    if figure.low is None or figure.high is None:
        return "–"
    return f"{decimals(figure.low)} to {decimals(figure.high)}"


def attack_tables(record: Mapping[str, Any]) -> Iterator[Table]:
    """A table for each attack; below it what was not measured, and what has to be known.

    Args:
        record: What attacks.json holds.

    Raises:
        ArtifactError: a part has the wrong type.
    """
    for name, found in as_record(dict(record), Attacks, "attacks").attacks.items():
        table = Table(title=Text(f"{found.title} ({name}; {found.paper})"), title_justify="left")
        table.add_column("Where", overflow="fold")
        table.add_column("Measure", overflow="fold")
        for heading in ("Value", "95 % interval", "By chance"):
            table.add_column(heading, justify="right")
        table.add_column("Of", overflow="fold")
        for figure in found.figures:
            numbers = decimals(figure.value), interval(figure), decimals(figure.chance)
            table.add_row(Text(figure.where), Text(figure.measure), *numbers, Text(figure.of))
        said = [f"Attacker: {found.sees}.", *(f"Not measured: {why}" for why in found.missing), *found.notes]
        table.caption, table.caption_justify = Text("\n".join(said)), "left"
        yield table
