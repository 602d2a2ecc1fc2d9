"""Peak memory of merging two updates of ten million float32 parameters, file to file.

    python benchmarks/merge_memory.py [--parameters 10000000] [--clients 2]

Each merge runs in a process of its own. Peak resident memory above what the process held after its imports and a merge
of a few values, which loads the compiled kernels, is compared with the size of the input files, which are mapped: a
page read counts until it is given back. The limit is inputs plus 30 %.
Writes benchmarks/results/merge_memory.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import commit, resident

LIMIT = 1.3
RESULTS = Path(__file__).parent / "results" / "merge_memory.json"


def measured(paths: list[Path], out: Path, rule: str, options: dict[str, Any]) -> dict[str, float]:
    """Merge in this process and say what it took."""
    import torch

    from fedproxy.aggregation.merge import kernels, merge
    from fedproxy.federation.merge_files import merge_files

    least, kernels.SMALLEST = kernels.SMALLEST, 0
    merge([{"w": torch.randn(100)}] * 2, rule, **options)
    kernels.SMALLEST = least
    baseline = resident("VmRSS")
    began = time.perf_counter()
    merge_files(paths, out, rule, out.with_name("conflict.safetensors"), **options)
    seconds = time.perf_counter() - began
    peak = resident("VmHWM")
    inputs = sum(path.stat().st_size for path in paths)
    ratio = (peak - baseline) / inputs
    return {
        "inputs_bytes": inputs,
        "baseline": baseline,
        "peak": peak,
        "ratio": round(ratio, 4),
        "seconds": round(seconds, 2),
    }


def make_updates(directory: Path, clients: int, parameters: int) -> list[Path]:
    """Random updates of 100 tensors and a rest."""
    import torch

    from fedproxy.tensor_files import save_tensors

    paths = []
    for client in range(clients):
        generator = torch.Generator().manual_seed(client)
        sizes = [parameters // 100] * 100 + [parameters % 100]
        tensors = {f"layer.{k:03}": torch.randn(size, generator=generator) for k, size in enumerate(sizes) if size}
        paths.append(directory / f"client{client}.safetensors")
        save_tensors(paths[-1], tensors)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        job = json.loads(arguments.child)
        found = measured([Path(path) for path in job["paths"]], Path(job["out"]), job["rule"], job["options"])
        print(json.dumps(found))
        return

    import torch

    from fedproxy.artifacts import versions, write_json

    # With two clients Eq. 10 keeps everything; r0 = 0.8 makes H-TIES select as well.
    jobs: dict[str, tuple[str, dict[str, Any]]] = {
        "mean": ("mean", {}),
        "ties": ("ties", {}),
        "h-ties": ("h-ties", {}),
        "h-ties r0=0.8": ("h-ties", {"r0": 0.8}),
    }
    rules: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        paths = make_updates(Path(directory), arguments.clients, arguments.parameters)
        for label, (rule, options) in jobs.items():
            out = Path(directory) / f"merged-{len(rules)}" / "merged.safetensors"
            job = {"paths": [str(path) for path in paths], "out": str(out), "rule": rule, "options": options}
            command = [sys.executable, __file__, "--child", json.dumps(job)]
            rules[label] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    worst = max(rules.values(), key=lambda found: found["ratio"])
    record = {
        "clients": arguments.clients,
        "parameters": arguments.parameters,
        **worst,
        "limit": LIMIT,
        "within_limit": worst["ratio"] <= LIMIT,
        "rules": rules,
        "commit": commit(),
        "versions": versions(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, record)
    print(json.dumps(record, indent=2))
    if not record["within_limit"]:
        raise SystemExit(f"Merging took {worst['ratio']:.2f} times the inputs; the limit is {LIMIT}.")


if __name__ == "__main__":
    main()
