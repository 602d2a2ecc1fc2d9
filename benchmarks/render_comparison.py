"""The laboratory's comparisons as tables, for render.py."""

import json
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fedproxy.metrics import verdict

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LAB = ROOT / "experiments" / "lab" / "results"
SMOLLM2 = ROOT / "experiments" / "smollm2"
GEMMA3 = ROOT / "experiments" / "gemma3"
PAIRS = SMOLLM2 / "eight_pairs.json"
PAIR_SHARES, PAIR_QUARTER = SMOLLM2 / "pairs_shares.json", SMOLLM2 / "pairs_quarter.json"
CENTRAL = "centralized-5e-4"
"""The row of `PAIRS` that stands for central tuning, at the rate that was best for it."""


def loaded(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def load(name: str) -> dict[str, Any]:
    """A benchmark's result."""
    return loaded(RESULTS / f"{name}.json")


def comparison(name: str, folder: Path = LAB, without: Collection[str] = ()) -> str:
    """A comparison: every method's means over the seeds, and whether FedProxy is told apart from it.

    Args:
        name: Of its result file.
        folder: Where that lies.
        without: Columns that are left out.
    """
    result = loaded(folder / f"{name}.json")
    several = len(result["compare"]["ratios"]) > 1
    against = {(row["method"], row["remove"]): row for row in result["differences"] if row["against"] == "fedproxy"}
    columns = (
        "sets",
        "accuracy",
        "tuned proxy",
        "gap closed",
        "worst client",
        "exposed",
        "MB up",
        "MB down",
        "against FedProxy",
    )
    rows = []
    for row in result["summary"]:
        key = row["method"], row["remove"]
        cells = [cell for cell in result["cells"] if (cell["method"], cell["remove"]) == key]
        tuned, gap = row["proxy_tuned"], row["gap_closed"]
        sent = [statistics.fmean(cell["bytes_up"] for cell in cells) / 1e6]
        sent.append(statistics.fmean(cell["bytes_down"] for cell in cells) / 1e6)
        values = [
            sets(result, row["method"]),
            ranged(row["accuracy"]),
            f"{100 * tuned['mean']:.1f}" if tuned else "",
            f"{100 * gap['mean']:.0f} ({100 * gap['low']:.0f}–{100 * gap['high']:.0f})" if gap else "",
            f"{100 * row['worst']['mean']:.1f}",
            f"{100 * cells[0]['exposed']:.0f}",
            *(f"{megabytes:.1f}" for megabytes in sent),
            difference(against[key]) if key in against else "",
        ]
        rows.append([f"{row['method']}, {row['remove']:.0%} removed" if several else row["method"], *values])
    titles = ["%", *columns]
    told = [place for place, cells in enumerate(zip(*rows, strict=True)) if any(cells) and titles[place] not in without]
    lines = ["| " + " | ".join(titles[place] for place in told) + " |", "|---" * len(told) + "|"]
    lines += ["| " + " | ".join(row[place] for place in told) + " |" for row in rows]
    return "\n".join(lines)


def gap(result: dict[str, Any], method: str, removed: float, reference: str) -> dict[str, float]:
    """The share of the gap that a method closes, up to a row that stands for central tuning: mean and ends over the seeds."""
    found = {
        (cell["method"], cell["seed"]): cell["accuracy"]["average"]
        for cell in result["cells"]
        if cell["remove"] == removed
    }
    closed = [
        (found[method, seed] - found["zero-shot", seed]) / (found[reference, seed] - found["zero-shot", seed])
        for seed in result["compare"]["seeds"]
    ]
    return {"mean": statistics.fmean(closed), "low": min(closed), "high": max(closed)}


def comparison_by_task(name: str) -> str:
    """A laboratory comparison's means for each task."""
    result = loaded(LAB / f"{name}.json")
    tasks = list(result["summary"][0]["tasks"])
    lines = ["| accuracy by task, % | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for row in result["summary"]:
        means = " | ".join(f"{100 * row['tasks'][task]['mean']:.1f}" for task in tasks)
        lines.append(f"| {row['method']} | {means} |")
    return "\n".join(lines)


def sets(result: dict[str, Any], method: str) -> str:
    """What a variant sets, as code: braces would be taken for marks of the page."""
    found = result["methods"][method].get("sets", "")
    return f"`{found}`" if found else ""


def ranged(spread: dict[str, float]) -> str:
    return f"{100 * spread['mean']:.1f} ({100 * spread['low']:.1f}–{100 * spread['high']:.1f})"


def difference(row: dict[str, Any]) -> str:
    words = {"better": "better", "worse": "worse", "undecided": "not told apart"}
    found = words[verdict(row["low"], row["high"], row["by_seed"])]
    return f"{100 * row['mean']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]: {found}"
