"""A made-up comparison with every part that a compare.json can have."""

import random
from collections.abc import Sequence
from typing import Any

from fedproxy.methods import METHODS
from fedproxy.metrics import verdict
from fedproxy.reporting.rows import Compared
from fedproxy.typed_json import as_record

from .sample import round_record

TASKS = ["openbookqa", "arc_easy", "arc_challenge", "commonsense_qa", "sst2", "mrpc", "rte", "mnli"]
LEVELS = {"zero-shot": 0.51, "zero-shot-proxy": 0.34, "local": 0.58, "centralized": 0.71, "fedavg-llm": 0.695}
KEPT = [0, 1, 2, 3, 4, 11]
SCORES = [0.99, 0.11, 0.09, 0.07, 0.05, 0.03, 0.025, 0.02, 0.015, 0.012, 0.01, 0.04]


def parse(raw: Any, source: str = "FILE") -> Compared:
    return as_record(raw, Compared, source)


def federation(clients: Sequence[str], rounds: int, seed: int) -> dict[str, Any]:
    """What a cell holds of its rounds."""
    found = []
    for number in range(1, rounds + 1):
        record = round_record(number, list(clients), seed)
        analysis = {
            key: record["analysis"][key]
            for key in ("names", "similarity", "heterogeneity", "weights", "retention", "conflict_mean")
        }
        found.append(
            {
                "round": number,
                "clients": {
                    name: {"rows": client["rows"], "loss": client["loss"] + 0.01 * (seed % 9)}
                    for name, client in record["clients"].items()
                },
                "quarantined": [],
                "analysis": analysis,
                "conflict": {str(block): 0.5 + 0.01 * (block + number) for block in KEPT},
            }
        )
    return {"proxy": {"layer_map": KEPT, "scores": SCORES}, "rounds": found}


def cell(
    name: str, seed: int, remove: float, tasks: Sequence[str], clients: Sequence[str], rounds: int
) -> dict[str, Any]:
    """The record of one cell."""
    rng = random.Random(f"{name} {seed} {remove}")
    data = METHODS[name].data if name in METHODS else "clients"
    level = LEVELS.get(name, 0.63 + 0.001 * len(name)) - (0.1 * (remove - 0.5) if name not in LEVELS else 0.0)
    scores = {task: min(1.0, level + rng.uniform(-0.04, 0.04)) for task in tasks}
    average = sum(scores.values()) / len(scores)
    worst = min(scores, key=lambda task: scores[task])
    whole = name in ("zero-shot", "centralized")
    exposed = (
        0.0
        if whole
        else 1.0
        if name == "fedavg-llm"
        else 0.31
        if name in ("fedot", "fedbiot", "offsite-tuning")
        else 0.56
    )
    trained = data != "none"
    travels = data in ("each", "clients")
    record = {
        "method": name,
        "seed": seed,
        "remove": remove,
        "accuracy": {"tasks": scores, "average": average},
        "proxy_tuned": {"tasks": scores, "average": average - 0.02} if trained and not whole else None,
        "worst": {"task": worst, "accuracy": scores[worst]},
        "gap_closed": (average - 0.51) / 0.2,
        "exposed": exposed,
        "proxy_bytes": int(4e9 * exposed),
        "bytes_up": int(3e8 * rng.uniform(0.99, 1.01)) if travels else 0,
        "bytes_down": int(6e8 * rng.uniform(0.99, 1.01)) if data == "clients" else 0,
        "flops": {
            "server": 2.1e15 if name != "zero-shot" else 0.0,
            "clients": 8.4e15 if travels else 0.0,
            "client_most": 2e15,
        },
        "peak_memory_bytes": {"server": 5_100_000_000, "clients": 3_300_000_000 if trained else None},
        "seconds": {"compress": 61.0, "federate": 840.0 if trained else 0.0, "fuse": 4.0, "evaluate": 210.5},
    }
    if trained:
        record["trainings"] = [f"{'fedavg' if name == 'proxy-tuning' else name} {seed} {remove}"]
    return record | (federation(clients, rounds, len(name) + 10 * seed) if data == "clients" else {})


def difference(name: str, against: str, remove: float, seeds: Sequence[int]) -> dict[str, Any]:
    """A difference as `paired_difference` records it."""
    rng = random.Random(f"{name} {against} {remove}")
    mean = LEVELS.get(name, 0.64) - LEVELS.get(against, 0.64) + rng.uniform(-0.012, 0.012)
    low, high = mean - 0.011, mean + 0.012
    by_seed = [mean + rng.uniform(-0.012, 0.012) for _ in seeds]
    return {
        "method": name,
        "against": against,
        "remove": remove,
        "tasks": TASKS,
        "mean": mean,
        "low": low,
        "high": high,
        "by_seed": by_seed,
        "verdict": verdict(low, high, by_seed),
        "draws": 2000,
        "level": 0.95,
    }


def methods_sample(
    names: Sequence[str] = tuple(METHODS),
    *,
    seeds: Sequence[int] = (0, 1, 2),
    ratios: Sequence[float] = (0.5,),
    tasks: Sequence[str] = tuple(TASKS),
    clients: Sequence[str] | None = None,
    rounds: int = 5,
) -> dict[str, Any]:
    """What compare.json holds of these methods, seeds, ratios, tasks and clients."""
    clients = [f"owner of {task}" for task in tasks] if clients is None else clients
    return {
        "name": "eight tasks",
        "compare": {"methods": list(names), "seeds": list(seeds), "ratios": list(ratios)},
        "experiment": {
            "name": "eight tasks",
            "seed": 0,
            "llm": {"path": "llm"},
            "compress": {"remove": 0.5, "score": "block-influence", "calibration": "calibration.txt"},
            "client": [{"name": name, "task": task} for name, task in zip(clients, tasks, strict=False)],
            "federate": {"rounds": rounds, "merge": "h-ties", "regulariser": "pcr"},
        },
        "experiment_sha256": "ab" * 32,
        "commit": "cd" * 20,
        "environment": {"python": "3.11.9", "platform": "Linux", "versions": {"torch": "2.13.0", "peft": "0.21.2"}},
        "methods": {
            name: {**METHODS[name].axes, "paper": METHODS[name].paper} if name in METHODS else {"data": "clients"}
            for name in names
        },
        "flops": "A trained token: 2 N + 2 N_behind + 6 P.",
        "cells": [
            cell(name, seed, remove, tasks, clients, rounds) for seed in seeds for remove in ratios for name in names
        ],
        "differences": [
            difference(name, against, remove, seeds)
            for remove in ratios
            for against in ("fedproxy", "centralized")
            for name in names
            if against in names and name != against
        ],
    }
