"""Bytes a round and final quality of the demo experiment for each encoding of the wire, over seeds.

    python benchmarks/wire.py [--seeds 0,1,2] [--wires fp32,int8,...]

Every cell is the whole demo with one encoding: compress, federate, fuse, and the harness on the tuned proxy and the fused
LLM. Bytes are counted as they travel: encoded updates up; adapter and bit-packed conflict down. Writes
benchmarks/results/wire.json after each cell, and goes on from there with --resume.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from fedproxy.artifacts import write_json
from fedproxy.demo import EXPERIMENT
from fedproxy.pipeline import read_experiment, run
from fedproxy.run_directory import environment

HERE = Path(__file__).parent
WIRES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"wire": "bf16", "wire_down": "bf16"},
    "int8": {"wire": "int8", "wire_down": "int8"},
    "int4": {"wire": "int4", "wire_down": "int4"},
    "top-k, the round's retention": {"wire": "top-k", "wire_options": {"values": "int8"}, "wire_down": "int8"},
    "top-k 25 %, int4": {"wire": "top-k", "wire_options": {"share": 0.25, "values": "int4"}, "wire_down": "int4"},
    "top-k 10 %, int4": {"wire": "top-k", "wire_options": {"share": 0.1, "values": "int4"}, "wire_down": "int4"},
    "top-k 3 %, int4": {"wire": "top-k", "wire_options": {"share": 0.03, "values": "int4"}, "wire_down": "int4"},
}
LIMIT = 1 / 8
MODELS = ("proxy_tuned", "fused")


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def cell(name: str, seed: int) -> dict[str, Any]:
    demo = read_experiment(EXPERIMENT)
    evaluate = dataclasses.replace(demo.evaluate, centralized=False, models=list(MODELS))
    federate = dataclasses.replace(demo.federate, **WIRES[name])
    experiment = dataclasses.replace(demo, seed=seed, federate=federate, evaluate=evaluate)
    with tempfile.TemporaryDirectory() as folder:
        results = run(experiment, Path(folder) / "run")
    replies = [client for record in results["rounds"] for client in record["clients"].values()]
    return {
        "wire": name,
        "seed": seed,
        "average": {model: results["evaluation"][model]["average"] for model in MODELS},
        "bytes_up": sum(reply["bytes_up"] for reply in replies) / len(replies),
        "bytes_down": sum(reply["bytes_down"] for reply in replies) / len(replies),
        "seconds": results["cost"]["seconds"]["federate"],
    }


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """For each encoding bytes a client and round, and quality beside that of plain float32."""
    found: dict[str, Any] = {}
    for name in WIRES:
        own = [c for c in cells if c["wire"] == name]
        if not own:
            continue
        plain = {c["seed"]: c for c in cells if c["wire"] == "fp32" and c["seed"] in {o["seed"] for o in own}}
        up, down = (statistics.fmean(c[key] for c in own) for key in ("bytes_up", "bytes_down"))
        base_up, base_down = (statistics.fmean(c[key] for c in plain.values()) for key in ("bytes_up", "bytes_down"))
        found[name] = {
            "settings": WIRES[name],
            "seeds": len(own),
            "bytes_up": up,
            "bytes_down": down,
            "share_of_fp32_up": up / base_up,
            "share_of_fp32": (up + down) / (base_up + base_down),
        }
        for model in MODELS:
            quality = spread([c["average"][model] for c in own])
            reference = spread([c["average"][model] for c in plain.values()])
            paired = spread([c["average"][model] - plain[c["seed"]]["average"][model] for c in own])
            found[name][model] = {
                **quality,
                "difference_by_seed": paired,
                "mean_within_spread_of_fp32": reference["min"] <= quality["mean"] <= reference["max"],
                "mean_not_below_spread_of_fp32": reference["min"] <= quality["mean"],
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--wires", default=";".join(WIRES), help="names separated by semicolons")
    parser.add_argument("--resume", action="store_true", help="keep the cells that are there")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "wire.json")
    args = parser.parse_args()
    cells = json.loads(args.out.read_text())["cells"] if args.resume and args.out.is_file() else []
    for seed in map(int, args.seeds.split(",")):
        for name in args.wires.split(";"):
            if any((c["wire"], c["seed"]) == (name, seed) for c in cells):
                continue
            cells.append(cell(name, seed))
            print(json.dumps(cells[-1]), flush=True)
            write_json(
                args.out,
                {"limit": LIMIT, "summary": summary(cells), "cells": cells, "environment": environment()},
            )


if __name__ == "__main__":
    main()
