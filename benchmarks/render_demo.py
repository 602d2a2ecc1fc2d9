"""The demo's outcome as tables and as a drawing that reads on light and dark ground, for render.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "demo_quality.json"
NAMES = {
    "llm": "LLM",
    "proxy": "proxy",
    "proxy_tuned": "tuned proxy",
    "fused": "fused LLM",
    "centralized": "centralized",
}
METHODS = {
    "fedproxy": "H-TIES + PCR",
    "mean": "mean (FedAvg on the proxy)",
    "scaffold": "mean + SCAFFOLD",
    "product": "H-TIES of the products B·A",
    "product-mean": "mean of the products B·A",
    "frozen-a": "H-TIES + PCR of B on a frozen A",
}
WIDTH, ROW, LEFT, RIGHT = 520, 34, 108, 420
STYLE = """
    svg { font: 15px system-ui, sans-serif; }
    .ground { fill: #fff; } .bar { fill: #b9c1cc; } .fused { fill: #b4540a; } text { fill: #1c2430; }
    .range { stroke: #1c2430; stroke-width: 2; }
    @media (prefers-color-scheme: dark) {
      .ground { fill: #14171b; } .bar { fill: #4a5461; } .fused { fill: #f0a35e; } text { fill: #e8ecf1; }
      .range { stroke: #e8ecf1; }
    }
  """


def percent(spread: dict[str, float]) -> str:
    return f"{100 * spread['mean']:.1f} ({100 * spread['min']:.1f}–{100 * spread['max']:.1f})"


def quality() -> str:
    """The demo's scores: mean and range over seeds, in per cent."""
    result = json.loads(RESULT.read_text())
    lines = ["| accuracy, % | " + " | ".join(NAMES.values()) + " | gap closed |", "|---" * 7 + "|"]
    for method, row in result["summary"].items():
        gap = row["gap_closed"]
        cells = " | ".join(percent(row["average"][name]) for name in NAMES)
        lines.append(f"| {METHODS[method]} | {cells} | {gap['mean']:.2f} ({gap['min']:.2f}–{gap['max']:.2f}) |")
    lines += ["", f"Mean of the four tasks; mean and range over {len(seeds(result))} seeds."]
    tasks = list(result["cells"][0]["tasks"]["llm"])
    lines += ["", "| H-TIES + PCR, by task, % | " + " | ".join(NAMES.values()) + " |", "|---" * 6 + "|"]
    own = [cell for cell in result["cells"] if cell["method"] == "fedproxy"]
    for task in tasks:
        means = [sum(cell["tasks"][name][task] for cell in own) / len(own) for name in NAMES]
        lines.append(f"| {task} | " + " | ".join(f"{100 * mean:.1f}" for mean in means) + " |")
    stages = own[0]["seconds"]
    sizes = own[0]["bytes"]
    lines += [
        "",
        "Seconds of each stage (seed 0): " + ", ".join(f"{k} {v:.0f}" for k, v in stages.items()) + ". "
        f"Sent by all clients in all rounds: {sizes['bytes_up'] / 1e6:.1f} MB up, {sizes['bytes_down'] / 1e6:.1f} MB down, "
        f"besides the proxy of {sizes['proxy_bytes'] / 1e6:.1f} MB. Peak memory {own[0]['peak_memory_bytes'] / 1e9:.1f} GB.",
    ]
    return "\n".join(lines)


def seeds(result: dict[str, Any]) -> set[int]:
    return {cell["seed"] for cell in result["cells"]}


def outcome() -> tuple[str, str]:
    """What came out of the demo: the drawing, and the sentence beside it."""
    result = json.loads(RESULT.read_text())
    found = result["summary"]["fedproxy"]
    models, gap = found["average"], found["gap_closed"]
    drawing = bars(
        f"Accuracy on the four tasks: mean and range over {len(seeds(result))} seeds",
        {NAMES[name]: models[name] for name in NAMES},
        NAMES["fused"],
    )
    gained = f"{100 * models['llm']['mean']:.1f} % to {100 * models['fused']['mean']:.1f} %"
    text = (
        f"![Accuracy of the LLM, the proxy, the tuned proxy, the fused LLM and the centrally tuned one](docs/images/demo.svg)\n\n"
        f"The LLM went from {gained} right: {100 * gap['mean']:.0f} % of the way to the LLM that was tuned on everybody's data in one place. "
        f"These are means over {len(seeds(result))} seeds. A demo of your own is one more run, and lands within a point or two of them."
    )
    return drawing, text


def bars(title: str, spreads: Mapping[str, Mapping[str, float]], marked: str) -> str:
    """One bar a row from 0 to the mean, with a line from the least to the most.

    Args:
        title: What is drawn.
        spreads: Row → mean, min and max, as shares from 0 to 1.
        marked: The row that is coloured.
    """

    def place(share: float) -> float:
        return LEFT + (RIGHT - LEFT) * share

    height = 44 + ROW * len(spreads)
    drawn = []
    for number, (name, spread) in enumerate(spreads.items()):
        top = 36 + ROW * number
        kind = "fused" if name == marked else "bar"
        drawn += [
            f'<text x="{LEFT - 8}" y="{top + 17}" text-anchor="end">{name}</text>',
            f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{place(spread["mean"]) - LEFT:.1f}" height="24"/>',
            f'<path class="range" d="M{place(spread["min"]):.1f} {top + 12}H{place(spread["max"]):.1f}"/>',
            f'<text x="{place(spread["max"]) + 8:.1f}" y="{top + 17}">{100 * spread["mean"]:.1f} %</text>',
        ]
    lines = "\n  ".join(drawn)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title">
  <style>{STYLE}</style>
  <rect class="ground" width="{WIDTH}" height="{height}"/>
  <text id="title" x="12" y="22" font-weight="600">{title}</text>
  {lines}
</svg>
"""
