"""The figures and tables that docs/evidence.md is filled with."""

import statistics
from pathlib import Path
from typing import Any

from render_comparison import (
    CENTRAL,
    GEMMA3,
    LAB,
    PAIR_QUARTER,
    PAIR_SHARES,
    PAIRS,
    SMOLLM2,
    difference,
    gap,
    loaded,
    ranged,
    sets,
)

from fedproxy.config import Train
from fedproxy.models.training import optimizer_steps

SHARES, CAUSES = SMOLLM2 / "eight_shares.json", SMOLLM2 / "eight_causes.json"
RATES, STEPS, REGULARISERS = SMOLLM2 / "rates.json", LAB / "steps.json", LAB / "regularisers.json"
TOLD = ("train", "federate", "fuse")
GOALS = {0.5: 0.95, 0.75: 0.85}
"""Share of the gap that the fused LLM shall close, by the share of blocks removed."""
POINTS = 10
"""By how much FedProxy shall be better than FedOT and FedBiOT, in points of accuracy."""


def in_short() -> str:
    """What FedProxy reaches, by LLM and share removed."""
    lines = [
        "| accuracy, % | untuned LLM | fused LLM | tuned proxy | centrally tuned LLM | gap closed |",
        "|---" * 6 + "|",
    ]
    for where, file, reference, shares in (
        ("laboratory", LAB / "product.json", "centralized", (0.25, 0.5, 0.75)),
        ("SmolLM2", PAIR_QUARTER, CENTRAL, (0.25,)),
        ("SmolLM2", PAIR_SHARES, CENTRAL, (0.5, 0.75)),
    ):
        result = loaded(file)
        rows = {(row["method"], row["remove"]): row for row in result["summary"]}
        for removed in shares:
            ours = rows["fedproxy", removed]
            cells = [
                f"{where}, {removed:.0%} removed",
                f"{100 * rows['zero-shot', removed]['accuracy']['mean']:.1f}",
                ranged(ours["accuracy"]),
                f"{100 * ours['proxy_tuned']['mean']:.1f}",
                f"{100 * rows[reference, removed]['accuracy']['mean']:.1f}",
                f"{share_of(gap(result, 'fedproxy', removed, reference))} %",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def goals() -> str:
    """Each goal, what was measured, and whether it is met."""
    lab, product, real = (loaded(path) for path in (LAB / "heterogeneous.json", LAB / "product.json", SHARES))
    lines = ["| goal | where | measured | |", "|---|---|---|---|"]
    scaled, pairs = loaded(LAB / "three_quarters.json"), loaded(PAIRS)
    for where, result, method, asked, reference in (
        ("laboratory, `fedproxy`", product, "fedproxy", GOALS, "centralized"),
        ("laboratory, H-TIES of the products", product, "product", GOALS, "centralized"),
        ("laboratory, H-TIES of the products, plugged in at 1.25", scaled, "scale-1.25", [0.75], "centralized"),
        ("SmolLM2, `fedproxy`, batches of 8", real, "fedproxy", GOALS, "centralized"),
        ("SmolLM2, H-TIES of the products, batches of 8", real, "product", GOALS, "centralized"),
        ("SmolLM2, `fedproxy`, batches of 2", pairs, "fedproxy", [0.5], CENTRAL),
        ("SmolLM2, `fedproxy`, batches of 2", loaded(PAIR_SHARES), "fedproxy", [0.75], CENTRAL),
        ("SmolLM2, `fedproxy`, batches of 2, plugged in at 1.25", loaded(PAIR_SHARES), "scale-1.25", GOALS, CENTRAL),
        ("SmolLM2, `fedproxy`, batches of 2, plugged in at 1.5", loaded(PAIR_SHARES), "scale-1.5", GOALS, CENTRAL),
        ("SmolLM2, `fedproxy`, batches of 2, refitted", loaded(PAIR_SHARES), "refit", GOALS, CENTRAL),
    ):
        for removed in asked:
            goal, found = GOALS[removed], gap(result, method, removed, reference)
            told = f"{found['mean']:.3f} ({found['low']:.2f}–{found['high']:.2f})"
            met = "met" if found["mean"] >= goal else "**missed**"
            lines.append(f"| G of {goal:.2f} with {removed:.0%} removed | {where} | {told} | {met} |")
    for where, result, other in (
        ("laboratory", lab, "fedot"),
        ("laboratory", lab, "fedbiot"),
        ("SmolLM2, batches of 2", pairs, "fedot"),
        ("SmolLM2, batches of 2", pairs, "fedbiot"),
    ):
        accuracy = {row["method"]: row["accuracy"] for row in result["summary"]}
        lead = 100 * (accuracy["fedproxy"]["mean"] - accuracy[other]["mean"])
        both = f"{ranged(accuracy['fedproxy'])} against {ranged(accuracy[other])} %"
        met = "met" if lead >= POINTS else "**missed**"
        lines.append(
            f"| {POINTS} points above `{other}` | {where}, `fedproxy`, half removed | {lead:+.1f}: {both} | {met} |"
        )
    return "\n".join(lines)


def share(removed: float) -> str:
    """The share of the gap that FedProxy closes on SmolLM2 with eight clients."""
    return f"{100 * _eight('fedproxy', removed)['gap_closed']['mean']:.0f} %"


def gain(removed: float) -> str:
    """FedProxy's points above the untuned LLM there."""
    tuned, untuned = (_eight(method, removed)["accuracy"]["mean"] for method in ("fedproxy", "zero-shot"))
    return f"{100 * (tuned - untuned):.0f}"


def fused(method: str) -> str:
    """What a row of the causes ends with."""
    return f"{100 * _accuracy(CAUSES, method):.1f}"


def lead(method: str, other: str) -> str:
    """By how many points one of them is above another."""
    return f"{100 * (_accuracy(CAUSES, method) - _accuracy(CAUSES, other)):.0f}"


def _accuracy(file: Path, method: str) -> float:
    rows: list[dict[str, Any]] = loaded(file)["summary"]
    return next(float(row["accuracy"]["mean"]) for row in rows if row["method"] == method)


def _eight(method: str, removed: float) -> dict[str, Any]:
    rows: list[dict[str, Any]] = loaded(SHARES)["summary"]
    return next(row for row in rows if (row["method"], row["remove"]) == (method, removed))


def learnable() -> str:
    """SmolLM2's tasks before and after central tuning."""
    before, after = (row["tasks"] for row in loaded(SMOLLM2 / "tasks.json")["summary"])
    lines = ["| accuracy, % | untuned | centrally tuned |", "|---|---|---|"]
    lines += [f"| {task} | {100 * before[task]['mean']:.0f} | {100 * after[task]['mean']:.0f} |" for task in before]
    return "\n".join(lines)


def three_quarters() -> str:
    """The laboratory's rows with three quarters removed, and each seed's difference from `product`."""
    result = loaded(LAB / "three_quarters.json")
    found = {(cell["method"], cell["seed"]): cell["accuracy"]["average"] for cell in result["cells"]}
    lines = [
        "| % | what it sets | tuned proxy | fused LLM | gap closed | against `product`, by seed |",
        "|---" * 6 + "|",
    ]
    for row in result["summary"]:
        name, tuned, gap = row["method"], row["proxy_tuned"], row["gap_closed"]
        apart = [100 * (found[name, seed] - found["product", seed]) for seed in result["compare"]["seeds"]]
        cells = [
            name,
            sets(result, name),
            f"{100 * tuned['mean']:.1f}" if tuned else "",
            ranged(row["accuracy"]),
            f"{100 * gap['mean']:.0f} ({100 * gap['low']:.0f}–{100 * gap['high']:.0f})",
            ", ".join(f"{value:+.1f}" for value in apart) if tuned and name != "product" else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ahead(method: str, other: str, file: Path = STEPS, removed: float = 0.5) -> str:
    """By how many points one row of a comparison is above another: mean and range over the seeds."""
    result = loaded(file)
    found = {
        (cell["method"], cell["seed"]): 100 * cell["accuracy"]["average"]
        for cell in result["cells"]
        if cell["remove"] == removed
    }
    points = [found[method, seed] - found[other, seed] for seed in result["compare"]["seeds"]]
    return f"{statistics.fmean(points):.1f} ({min(points):.1f}–{max(points):.1f})"


def against(method: str, file: Path, removed: float) -> str:
    """A row's paired difference from FedProxy, and whether it is told apart."""
    [found] = [
        row
        for row in loaded(file)["differences"]
        if (row["method"], row["against"], row["remove"]) == (method, "fedproxy", removed)
    ]
    return difference(found)


def tuned_proxy() -> str:
    """The share of the gap that the tuned proxy itself closes, before it is plugged in."""
    rows = {row["method"]: row for row in loaded(LAB / "three_quarters.json")["summary"]}
    low, high = (rows[name]["accuracy"]["mean"] for name in ("zero-shot", "centralized"))
    return f"{(rows['product']['proxy_tuned']['mean'] - low) / (high - low):.2f}"


def pooled() -> str:
    """Offsite tuning on all rows, which nobody has to merge."""
    rows = {row["method"]: row["accuracy"] for row in loaded(LAB / "heterogeneous.json")["summary"]}
    return f"{ranged(rows['offsite-tuning'])} % against {ranged(rows['fedproxy'])} %"


def compared(file: Path, reference: str = "centralized") -> str:
    """The rows of a comparison, with their ranges over the seeds if there are several."""
    result = loaded(file)
    several, ratios = (len(result["compare"][axis]) > 1 for axis in ("seeds", "ratios"))
    against = {(row["method"], row["remove"]): row for row in result["differences"] if row["against"] == "fedproxy"}
    lines = ["| % | what it sets | tuned proxy | fused LLM | gap closed | against FedProxy |", "|---" * 6 + "|"]
    for row in result["summary"]:
        name, removed, tuned = row["method"], row["remove"], row["proxy_tuned"]
        cells = [
            f"{name}, {removed:.0%} removed" if ratios else name,
            sets(result, name),
            f"{100 * tuned['mean']:.1f}" if tuned else "",
            ranged(row["accuracy"]) if several else f"{100 * row['accuracy']['mean']:.1f}",
            share_of(gap(result, name, removed, reference), several=several),
            difference(against[name, removed]) if (name, removed) in against else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def best_central(file: Path) -> str:
    """The row of central tuning that ends best."""
    accuracy = {row["method"]: row["accuracy"]["mean"] for row in loaded(file)["summary"]}
    return max((name for name in accuracy if name.startswith("centralized")), key=lambda name: accuracy[name])


def share_of(closed: dict[str, float], *, several: bool = True) -> str:
    """A share of the gap in percent, with its range over the seeds."""
    mean, low, high = (f"{100 * closed[key]:.0f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low}–{high})" if several else mean


def in_pairs(method: str) -> str:
    """The share of the gap that a row closes with batches of two."""
    return share_of(gap(loaded(PAIRS), method, 0.5, CENTRAL))


def with_pairs(method: str, *, tuned: bool = False, file: Path = PAIRS, removed: float = 0.5) -> str:
    """What a row with batches of two ends with, or its tuned proxy."""
    rows = {(row["method"], row["remove"]): row for row in loaded(file)["summary"]}
    return f"{100 * rows[method, removed]['proxy_tuned' if tuned else 'accuracy']['mean']:.1f}"


def chosen(method: str) -> str:
    """What a row of the rates ends with."""
    return f"{100 * _accuracy(RATES, method):.1f}"


def rates() -> str:
    """The rows that settings were chosen by, and how far each lets a client go."""
    result = loaded(RATES)
    best = best_central(RATES)
    lines = [
        "| % | rows in a step | rate | rounds | scale | steps | tuned proxy | LLM | gap closed |",
        "|---" * 9 + "|",
    ]
    variants = {one["name"]: one for one in result["compare"]["variant"]}
    for cell in result["cells"]:
        own = variants.get(cell["method"], {})
        told = {table: {**result["experiment"][table], **(own.get(table) or {})} for table in TOLD}
        trained, tuned = cell["method"] != "zero-shot", cell["proxy_tuned"]
        federated = tuned is not None
        rows, rounds = told["train"]["batch_size"], told["federate"]["rounds"]
        settings = Train(batch_size=rows, epochs=told["train"]["epochs"])
        each = [rounds * optimizer_steps(client["rows"], settings) for client in result["experiment"]["client"]]
        steps = max(each) if federated else sum(each)
        cells = [
            cell["method"],
            *([str(rows), f"{told['train']['learning_rate']:g}"] if trained else ["", ""]),
            *([str(rounds), f"{told['fuse']['scale']:g}"] if federated else ["", ""]),
            str(steps) if trained else "",
            f"{100 * tuned['average']:.1f}" if tuned else "",
            f"{100 * cell['accuracy']['average']:.1f}",
            share_of(gap(result, cell["method"], cell["remove"], best), several=False),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def perplexity() -> str:
    """The perplexities of LLM and proxies, on the calibration text and, where the proxy was healed, on text held out."""
    found = loaded(SMOLLM2 / "proxies.json")
    shares = {"with a quarter removed": "a quarter removed", "with half": "half removed"}
    told = [f"{found[key]['perplexity']['proxy']:.0f} {words}" for words, key in shares.items()]
    healed = found["half removed, healed"]["heal"]
    return (
        f"{', '.join(told)}, where the LLM's is {found['half removed']['perplexity']['llm']:.0f}; "
        f"{healed['steps']} steps of healing bring it from {healed['perplexity']['before']:.0f} to "
        f"{healed['perplexity']['after']:.0f} on text held out"
    )


def healed() -> str:
    """What healing makes of the perplexity of the proxy with three quarters removed."""
    found = loaded(SMOLLM2 / "proxies.json")["three quarters removed, healed"]["heal"]
    return f"{found['steps']} steps of healing on the same public text bring the proxy's perplexity to {found['perplexity']['after']:.0f} (seed 0)"


def refitted() -> str:
    """What a refit makes of the proxies' perplexity."""
    half, most = (
        loaded(SMOLLM2 / "proxies.json")[f"{share} removed, refitted"]["refit"]["perplexity"]
        for share in ("half", "three quarters")
    )
    return (
        f"The proxy's perplexity on public text held out goes from {half['before']:,.0f} to {half['after']:.0f} with half removed and from "
        f"{most['before']:,.0f} to {most['after']:.0f} with three quarters; the LLM's is {half['llm']:.0f} (seed 0, [proxies.json](../experiments/smollm2/proxies.json))."
    )


def first() -> str:
    """The first runs' accuracies by task."""
    runs = {"SmolLM2": loaded(SMOLLM2 / "first.json"), "Gemma 3": loaded(GEMMA3 / "first.json")}
    tasks = list(runs["SmolLM2"]["evaluation"]["fused"]["tasks"])
    lines = [f"| accuracy, % | {' | '.join(tasks)} | mean |", "|---" * (len(tasks) + 2) + "|"]
    for llm, run in runs.items():
        for model, how in (("llm", "untuned"), ("fused", "tuned")):
            found = run["evaluation"][model]
            values = [f"{100 * found['tasks'][task]['acc']:.0f}" for task in tasks]
            lines.append(f"| {llm}, {how} | {' | '.join(values)} | {100 * found['average']:.1f} |")
    return "\n".join(lines)
