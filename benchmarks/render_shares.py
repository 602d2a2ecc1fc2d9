"""The gap closed against the share of the LLM's blocks removed, drawn for README.md and docs/evidence.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from render_comparison import CENTRAL, LAB, PAIR_QUARTER, PAIR_SHARES, SMOLLM2, gap, loaded

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 320, 60, 390, 48, 272
SHARES = (0.25, 0.5, 0.75)
MOST = 1.2
STYLE = """
    svg { font: 14px system-ui, sans-serif; }
    .ground { fill: #fff; } text { fill: #1c2430; } .grid { stroke: #d5dae1; } .all { stroke: #1c2430; stroke-dasharray: 5 4; }
    .line { fill: none; stroke-width: 2.5; } .range { stroke-width: 1.5; }
    .c0 { stroke: #b4540a; } .d0 { fill: #b4540a; } .c1 { stroke: #1d6fa5; } .d1 { fill: #1d6fa5; } .c2 { stroke: #6b7684; } .d2 { fill: #6b7684; }
    @media (prefers-color-scheme: dark) {
      .ground { fill: #14171b; } text { fill: #e8ecf1; } .grid { stroke: #323a44; } .all { stroke: #e8ecf1; }
      .c0 { stroke: #f0a35e; } .d0 { fill: #f0a35e; } .c1 { stroke: #6db7e6; } .d1 { fill: #6db7e6; } .c2 { stroke: #9aa5b3; } .d2 { fill: #9aa5b3; }
    }
  """


@dataclass(frozen=True)
class Line:
    """A method on an LLM.

    Attributes:
        name: What stands beside it.
        files: The comparisons that measured it, each at shares of its own.
        method: Its name there.
        reference: The row that stands for central tuning.
        colour: Number of its colour.
    """

    name: str
    files: tuple[Path, ...]
    method: str
    colour: int
    reference: str = "centralized"


LINES = (
    Line("products", (LAB / "product.json",), "product", 1),
    Line("FedProxy", (LAB / "product.json",), "fedproxy", 0),
    Line("FedAvg", (LAB / "shares.json",), "fedavg", 2),
    Line("SmolLM2, batches of 2", (PAIR_QUARTER, PAIR_SHARES), "fedproxy", 0, CENTRAL),
    Line("SmolLM2, refitted", (PAIR_SHARES,), "refit", 1, CENTRAL),
    Line("SmolLM2, batches of 8", (SMOLLM2 / "eight_shares.json",), "fedproxy", 0),
)


def shares(lines: Sequence[Line] = LINES) -> str:
    """The drawing: a line a method, with its range over the seeds; a single share is a mark."""
    drawn = [
        f'<path class="grid" d="M{LEFT} {height(g):.1f}H{RIGHT}"/><text x="{LEFT - 8}" y="{height(g) + 5:.1f}" text-anchor="end">{g:g}</text>'
        for g in (0.0, 0.25, 0.5, 0.75)
    ]
    drawn += [
        f'<path class="all" d="M{LEFT} {height(1):.1f}H{RIGHT}"/><text x="{LEFT - 8}" y="{height(1) + 5:.1f}" text-anchor="end">1</text>',
        f'<text x="{RIGHT + 8}" y="{height(1) + 5:.1f}">centralized</text>',
    ]
    drawn += [
        f'<text x="{place(share):.1f}" y="{BOTTOM + 20}" text-anchor="middle">{share:.0%} removed</text>'
        for share in SHARES
    ]
    taken: list[float] = [height(1)]
    for line in lines:
        found = {
            row["remove"]: gap(result, line.method, row["remove"], line.reference)
            for result in map(loaded, line.files)
            for row in result["summary"]
            if row["method"] == line.method
        }
        points = [(place(share), closed) for share, closed in sorted(found.items())]
        path = "L".join(f"{x:.1f} {height(closed['mean']):.1f}" for x, closed in points)
        drawn.append(f'<path class="line c{line.colour}" d="M{path}"/>')
        for x, closed in points:
            low, high = height(closed["low"]), height(closed["high"])
            drawn.append(f'<path class="range c{line.colour}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
            drawn.append(f'<circle class="d{line.colour}" cx="{x:.1f}" cy="{height(closed["mean"]):.1f}" r="4"/>')
        x, closed = points[-1]
        y = apart(height(closed["mean"]) + 5, taken)
        drawn.append(f'<text x="{x + 10:.1f}" y="{y:.1f}">{line.name}</text>')
    inner = "\n  ".join(drawn)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title">
  <style>{STYLE}</style>
  <rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>
  <text id="title" x="12" y="22" font-weight="600">Share of the gap to central tuning that is closed</text>
  {inner}
</svg>
"""


def place(share: float) -> float:
    """Where a share removed lies, from the left."""
    first, last = LEFT + 50, RIGHT - 40
    return first + (last - first) * (share - SHARES[0]) / (SHARES[-1] - SHARES[0])


def height(closed: float) -> float:
    """Where a gap closed lies, from the top."""
    return BOTTOM - (BOTTOM - TOP) * closed / MOST


def apart(y: float, taken: list[float]) -> float:
    """A place for a text at y, or below it, so that it covers none of those before."""
    while any(abs(y - other) < 15 for other in taken):
        y += 1
    taken.append(y)
    return y
