"""Render docs/benchmarks.md, and the figures in README.md, from benchmarks/results/*.json: `make docs`."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "llm": "LLM",
    "proxy": "proxy",
    "proxy_tuned": "tuned proxy",
    "fused": "fused LLM",
    "centralized": "centralized",
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def percent(spread: dict[str, float]) -> str:
    return f"{100 * spread['mean']:.1f} ({100 * spread['min']:.1f}–{100 * spread['max']:.1f})"


def quality() -> str:
    """The demo's scores: mean and range over seeds, in per cent."""
    result = load("demo_quality")
    seeds = sorted({cell["seed"] for cell in result["cells"]})
    lines = ["| accuracy, % | " + " | ".join(NAMES.values()) + " | gap closed |", "|---" * 7 + "|"]
    for method, row in result["summary"].items():
        gap = row["gap_closed"]
        title = {"fedproxy": "H-TIES + PCR", "mean": "mean (FedAvg on the proxy)"}[method]
        cells = " | ".join(percent(row["average"][name]) for name in NAMES)
        lines.append(f"| {title} | {cells} | {gap['mean']:.2f} ({gap['min']:.2f}–{gap['max']:.2f}) |")
    lines += ["", f"Mean of the four tasks; mean and range over {len(seeds)} seeds."]
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


def memory() -> str:
    """Merge memory."""
    result = load("merge_memory")
    lines = ["| rule | inputs, MB | peak above baseline, MB | ratio | limit |", "|---|---|---|---|---|"]
    for rule, row in result["rules"].items():
        above = (row["peak"] - row["baseline"]) / 1e6
        lines.append(
            f"| {rule} | {row['inputs_bytes'] / 1e6:.0f} | {above:.0f} | {row['ratio']:.2f} | {result['limit']} |"
        )
    return "\n".join(lines)


def training() -> str:
    """Training loop throughput."""
    result = load("training_loop")
    lines = ["| loop | tokens/s (median) | relative to the bare loop of the same turn (range) |", "|---|---|---|"]
    for name, speed in result["tokens_per_second"].items():
        ratio = result["throughput_relative_to_bare"].get(name)
        shown = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})" if ratio else "1"
        lines.append(f"| {name} | {speed:,.0f} | {shown} |")
    return "\n".join(lines)


def hardware(name: str) -> str:
    found = load(name)["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    return f"{found['device']}, {found['cpus']} CPUs; Python {found['python']}; {versions}."


def main() -> None:
    page = f"""# Benchmarks

Rendered by `make docs` from `benchmarks/results/*.json`, which `make bench` writes. Machine: {hardware("demo_quality")}

## Demo experiment (`benchmarks/demo_quality.py`)

{quality()}

## Memory of `fedproxy merge` (`benchmarks/merge_memory.py`)

Two updates of ten million float32 parameters, file to file.

{memory()}

## Local training (`benchmarks/training_loop.py`)

{training()}
"""
    (ROOT / "docs" / "benchmarks.md").write_text(page)
    readme = ROOT / "README.md"
    text = readme.read_text()
    start, end = "<!-- results: rendered by make docs -->", "<!-- end of results -->"
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit("README.md has no results section to fill")
    readme.write_text(f"{before}{start}\n\n{quality()}\n\n{end}{after}")


if __name__ == "__main__":
    main()
