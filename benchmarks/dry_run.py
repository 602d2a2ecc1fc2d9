"""What a dry run of the demo experiment says, against what the run then takes.

    python benchmarks/dry_run.py [--repeats 3]

Each turn is a process of its own: it imports, measures the speed of a matrix product, forecasts the demo, runs it, and
measures the speed again. Compared are, for every client and round, steps, tokens and bytes, which must agree to the
last one; the bytes of the proxy, which may differ by the files' headers; the memory of training the client that needs
most, above what the process held before (clients that follow it in the same process start from what the C library did
not give back); and the time of every stage, relative to operations divided by the speed of the product.
That last ratio is what a training, or a stage, takes beyond a bare product: of a small LLM on a CPU.
Writes benchmarks/results/dry_run.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXACT = ("steps", "tokens", "bytes_up", "bytes_down")
STAGES = {"compress": "compress", "clients": "federate", "centralized": "centralized", "evaluate": "evaluate"}
"""Stage of the forecast → stage of the run."""
MEMORY = (0.7, 1.3)
"""Accuracy that `models.training_memory` is held to."""


def resident() -> int:
    """Bytes of this process that are resident now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024


def turn() -> dict[str, Any]:
    from fedproxy.demo import EXPERIMENT
    from fedproxy.forecast import forecast_run, measure_speed
    from fedproxy.pipeline import read_experiment, run

    experiment = read_experiment(EXPERIMENT)
    speeds = [measure_speed(experiment.train).flops]
    found = forecast_run(experiment, measure_speed(experiment.train))
    held = resident()
    with tempfile.TemporaryDirectory() as folder:
        results = run(experiment, Path(folder) / "run")
    speeds.append(measure_speed(experiment.train).flops)
    speed = statistics.fmean(speeds)
    rounds = [
        (found["clients"][name]["rounds"][record["round"] - 1], client)
        for record in results["rounds"]
        for name, client in record["clients"].items()
    ]
    first = results["rounds"][0]["clients"]
    return {
        "speeds": speeds,
        "exact": {what: all(foretold[what] == done[what] for foretold, done in rounds) for what in EXACT},
        "proxy_bytes": {"foretold": found["proxy"]["bytes"], "files": results["cost"]["proxy_bytes"]},
        "memory": {
            name: {
                "foretold": found["clients"][name]["memory"]["cpu"],
                "measured": first[name]["peak_memory_bytes"] - held,
            }
            for name in found["clients"]
        },
        "training_seconds": {
            "at_full_speed": found["flops"]["clients"] / speed,
            "measured": sum(done["seconds"] for _, done in rounds),
        },
        "stage_seconds": {
            there: {"at_full_speed": found["flops"][here] / speed, "measured": results["cost"]["seconds"][there]}
            for here, there in STAGES.items()
        },
    }


def ratios(turns: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Time measured over time at full speed, of training alone and of every stage."""
    found = {"training": [one["training_seconds"] for one in turns]}
    found |= {stage: [one["stage_seconds"][stage] for one in turns] for stage in STAGES.values()}
    return {
        name: {
            "median": statistics.median(values := [one["measured"] / one["at_full_speed"] for one in times]),
            "least": min(values),
            "most": max(values),
        }
        for name, times in found.items()
    }


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """What all turns say together."""
    most = [
        {what: max(client[what] for client in one["memory"].values()) for what in ("foretold", "measured")}
        for one in turns
    ]
    memory = statistics.median(one["foretold"] / one["measured"] for one in most)
    return {
        "exact": {what: all(one["exact"][what] for one in turns) for what in EXACT},
        "proxy_header_bytes": turns[0]["proxy_bytes"]["files"] - turns[0]["proxy_bytes"]["foretold"],
        "memory_foretold_over_measured": memory,
        "memory_limits": MEMORY,
        "memory_within_limits": MEMORY[0] < memory < MEMORY[1],
        "time_measured_over_full_speed": ratios(turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        print(json.dumps(turn()))
        return
    from fedproxy.artifacts import write_json
    from fedproxy.run_directory import environment

    command = [sys.executable, __file__, "--turn"]
    turns = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        for _ in range(arguments.repeats)
    ]
    record = {**summary(turns), "turns": turns, "environment": environment()}
    write_json(HERE / "results" / "dry_run.json", record)
    print(json.dumps(record, indent=2))
    if not all(record["exact"].values()):
        raise SystemExit("Steps, tokens or bytes are not what was foretold.")


if __name__ == "__main__":
    main()
