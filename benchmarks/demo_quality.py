"""Quality of the demo experiment over seeds: H-TIES with PCR, the plain mean, and what else can be merged or held together.

    python benchmarks/demo_quality.py [--seeds 0,1,2] [--methods fedproxy,mean]

The centralized upper bound and the untuned models are scored once for each seed. Writes
benchmarks/results/demo_quality.json.
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
from fedproxy.reporting import gap_closed
from fedproxy.run_directory import environment

HERE = Path(__file__).parent
METHODS: dict[str, dict[str, Any]] = {
    "fedproxy": {},
    "mean": {"merge": "mean", "regulariser": "none"},
    "scaffold": {"merge": "mean", "regulariser": "scaffold"},
    "product": {"space": "product", "regulariser": "none"},
    "product-mean": {"space": "product", "merge": "mean", "regulariser": "none"},
    "frozen-a": {"space": "frozen-a"},
}


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "demo_quality.json")
    args = parser.parse_args()
    demo = read_experiment(EXPERIMENT)
    cells: list[dict[str, Any]] = []
    for seed in map(int, args.seeds.split(",")):
        shared: dict[str, Any] = {}
        for method in args.methods.split(","):
            evaluate = demo.evaluate
            if shared:  # these do not depend on the method
                evaluate = dataclasses.replace(evaluate, centralized=False, models=["proxy_tuned", "fused"])
            federate = dataclasses.replace(demo.federate, **METHODS[method])
            experiment = dataclasses.replace(demo, seed=seed, federate=federate, evaluate=evaluate)
            with tempfile.TemporaryDirectory() as folder:
                results = run(experiment, Path(folder) / "run")
            evaluation = {**shared, **results["evaluation"]}
            shared = shared or {name: evaluation[name] for name in ("llm", "proxy", "centralized")}
            cell = {
                "method": method,
                "seed": seed,
                "average": {name: scores["average"] for name, scores in evaluation.items()},
                "tasks": {name: {t: m["acc"] for t, m in s["tasks"].items()} for name, s in evaluation.items()},
                "gap_closed": gap_closed(evaluation),
                "seconds": results["cost"]["seconds"],
                "bytes": {key: results["cost"][key] for key in ("bytes_up", "bytes_down", "proxy_bytes")},
                "peak_memory_bytes": results["cost"]["peak_memory_bytes"],
            }
            cells.append(cell)
            print(json.dumps({k: cell[k] for k in ("method", "seed", "average", "gap_closed")}), flush=True)
    summary = {
        method: {
            "gap_closed": spread([c["gap_closed"] for c in cells if c["method"] == method]),
            "average": {
                name: spread([c["average"][name] for c in cells if c["method"] == method])
                for name in ("llm", "proxy", "proxy_tuned", "fused", "centralized")
            },
        }
        for method in args.methods.split(",")
    }
    write_json(args.out, {"summary": summary, "cells": cells, "environment": environment()})


if __name__ == "__main__":
    main()
