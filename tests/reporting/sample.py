"""A made-up run with every part that a results.json can have."""

import copy
import math
import random
from pathlib import Path
from typing import Any

import torch

from fedproxy.records import Results
from fedproxy.tensor_files import save_tensors
from fedproxy.typed_json import as_record

TASKS = ["demo_snips", "demo_travel", "demo_banking", "demo_dbpedia"]
HOSTILE = [None, True, -1, 1e31, float("nan"), 10**400, "x", "", [], [None], ["x"], {}, {"x": "x"}, [[1.0]]]
"""Values of which few places can hold one."""
SCORES = {
    "llm": [0.11, 0.34, 0.19, 0.41],
    "proxy": [0.14, 0.15, 0.13, 0.22],
    "proxy_tuned": [0.93, 0.90, 0.86, 0.82],
    "fused": [0.89, 0.91, 0.81, 0.84],
    "centralized": [0.95, 0.96, 0.90, 0.91],
}


def changed(raw, path, value):
    raw = copy.deepcopy(raw)
    part = raw
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return raw


def paths(value, path=()):
    """Every place in a JSON value below its top."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from paths(entry, (*path, key))


def place_of(path):
    """A place as errors write it."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


def parse(raw: Any, source: str = "RUN/results.json") -> Results:
    return as_record(raw, Results, source)


def scored(values: list[float], tasks: list[str]) -> dict[str, Any]:
    return {
        "tasks": {task: {"acc": value, "n": 150} for task, value in zip(tasks, values, strict=True)},
        "average": sum(values) / len(values) if values else None,
    }


LEVELS = {"untuned": 3.2, "own": 1.1, "alone": 1.05, "global": 1.0}
"""What is scored on rows that clients keep back, and about how well."""


def score(rows: int, number: int, index: int, model: str) -> dict[str, Any]:
    loss = LEVELS[model] + 0.3 * index + (0.0 if model == "untuned" else 1.4 / number)
    return {"loss": loss, "rows": rows, "accuracy": None if index == 2 else 1 / (1 + loss)}


def together(names: list[str], number: int, model: str) -> dict[str, Any]:
    found = score(55, number, 1, model)
    means = {key: {"by_rows": found[key], "by_clients": found[key] * 1.01} for key in ("loss", "accuracy")}
    return {"clients": len(names), "rows": 55 * len(names), **means, "worst": {"client": names[-1], **found}}


def round_record(number: int, names: list[str], seed: int) -> dict[str, Any]:
    rng = random.Random(f"{seed} {number}")
    count = len(names)
    similarity = [[1.0] * count for _ in names]
    for i in range(count):
        for j in range(i):
            similarity[i][j] = similarity[j][i] = rng.uniform(-0.08, 0.22)
    rows = {name: rng.choice([528, 595, 600]) for name in names}
    weights = [math.exp(sum(map(abs, row))) for row in similarity]
    return {
        "round": number,
        "clients": {
            name: {
                "rows": rows[name],
                "tokens": 9000,
                "steps": 38,
                "loss": 0.3 + 2.4 / number ** (0.6 + 0.2 * index % 5),
                "seconds": 7.5 + index,
                "tokens_per_second": 9000 / (7.5 + index),
                "peak_memory_bytes": 900_000_000 + 1_000_000 * index,
                "wire": "fp32",
                "bytes_up": 1_310_720,
                "bytes_down": 2_621_440,
                "validation": {model: score(rows[name] // 10, number, index, model) for model in LEVELS},
            }
            for index, name in enumerate(names)
        },
        "quarantined": [],
        "validation": {
            **{model: together(names, number, model) for model in LEVELS},
            "gain": {"untuned": {"loss": 1.5, "accuracy": 0.4}, "alone": {"loss": -0.02, "accuracy": 0.01}},
            "best_round": number,
            "stop": False,
        },
        "analysis": {
            "names": names,
            "clients": count,
            "parameters": 327_680,
            "similarity": similarity,
            "heterogeneity": [0.9 + 0.02 * index / count for index in range(count)],
            "weights": [weight / sum(weights) for weight in weights],
            "retention": [1.0 - 0.2 * index / max(1, count - 1) for index in range(count)],
            "conflict_mean": 0.62,
            "conflict_histogram": [math.comb(count, k) * 1000 if k % 2 == count % 2 else 37 for k in range(count + 1)],
            "zero_fraction": 0.03,
        },
        "seconds": 41.2,
    }


def sample(names: list[str] | None = None, *, rounds: int = 5, tasks: list[str] | None = None) -> dict[str, Any]:
    """The results of a run with these clients, rounds and tasks."""
    names = names or ["assistant", "travel desk", "bank", "encyclopaedia"]
    tasks = TASKS if tasks is None else tasks
    evaluation = {model: scored(values[: len(tasks)], tasks) for model, values in SCORES.items()}
    records = [round_record(number, names, 0) for number in range(1, rounds + 1)]
    return {
        "name": "intents",
        "seed": 0,
        "llm": {"path": "llm", "blocks": 12, "parameters": 4_193_920, "sha256": "ab" * 32},
        "proxy": {
            "blocks": 6,
            "parameters": 2_343_200,
            "layer_map": [0, 1, 2, 3, 4, 11],
            "scores": [0.99, 0.11, 0.09, 0.07, 0.05, 0.03, 0.025, 0.02, 0.015, 0.012, 0.01, 0.04],
        },
        "evaluation": evaluation,
        "gap_closed": 0.89,
        "rounds": records,
        "kept_round": rounds,
        "cost": {
            "seconds": {"compress": 3.4, "federate": 141.0, "fuse": 0.6, "evaluate": 38.2, "centralized": 52.9},
            "bytes_up": 26_214_400,
            "bytes_down": 52_428_800,
            "proxy_bytes": 4_690_000,
            "peak_memory_bytes": 1_310_000_000,
        },
        "environment": {"python": "3.11.9", "platform": "Linux", "versions": {"torch": "2.13.0", "peft": "0.21.2"}},
        "experiment": {
            "name": "intents",
            "seed": 0,
            "llm": {"path": "llm"},
            "compress": {"remove": 0.5, "score": "block-influence", "samples": 512, "calibration": "calibration.txt"},
            "client": [{"name": name, "task": task, "rows": None} for name, task in zip(names, tasks, strict=False)],
            "train": {"epochs": 1, "batch_size": 16, "learning_rate": 2e-3, "lora_r": 16, "lora_alpha": 32},
            "federate": {"rounds": rounds, "merge": "h-ties", "regulariser": "pcr", "quorum": 0.75},
            "evaluate": {"tasks": tasks, "centralized": True},
        },
    }


def write_conflict(run: Path, *, rounds: int, blocks: int = 6) -> None:
    """The conflict of each round, as a run leaves it."""
    generator = torch.Generator().manual_seed(0)
    for number in range(1, rounds + 1):
        folder = run / "rounds" / f"{number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(
            folder / "conflict.safetensors",
            {
                f"base_model.model.model.layers.{block}.{kind}.lora_{side}.weight": torch.randint(
                    0, 5, (4, 4), generator=generator
                )
                / 4
                for block in range(blocks)
                for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
                for side in "AB"
            },
        )
