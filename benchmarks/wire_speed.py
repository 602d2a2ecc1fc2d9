"""Speed, size and error of the encodings of updates: ten million Gaussian float32 values in a hundred tensors.

    python benchmarks/wire_speed.py [--parameters 10000000] [--repeats 5] [--threads 1]

One process takes turns at a plain copy of the tensors, encoding, and decoding, so that each ratio compares neighbours in
time. MB/s are those of the float32 values (4 bytes each), whichever way; bits are those of all parts together, a value.
The error is |x̂ - x| / |x|. Writes benchmarks/results/wire_speed.json.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import commit

LIMIT = 200.0
"""MB/s that int8 and int4 must reach, both ways."""
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("fp32", {}),
    "bf16": ("bf16", {}),
    "int8": ("int8", {}),
    "int4": ("int4", {}),
    "top-k 80 % int8": ("top-k", {"share": 0.8}),
    "top-k 10 % int8": ("top-k", {"share": 0.1}),
    "top-k 10 % int4": ("top-k", {"share": 0.1, "values": "int4"}),
    "top-k 1 % int4": ("top-k", {"share": 0.01, "values": "int4"}),
}
RESULTS = Path(__file__).parent / "results" / "wire_speed.json"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 1),
        "least": round(min(values), 1),
        "most": round(max(values), 1),
    }


def measured(tensors: dict[str, Any], name: str, given: dict[str, Any], repeats: int) -> dict[str, Any]:
    from fedproxy.federation.wire import encoding

    row, options = encoding(name, given)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    count = sum(tensor.numel() for tensor in tensors.values())
    seconds: dict[str, list[float]] = {"copy": [], "encode": [], "decode": []}
    for turn in range(repeats + 1):  # the first turn warms up, and does not count
        copied, _ = timed(lambda: {key: tensor.clone() for key, tensor in tensors.items()})
        encoded, parts = timed(lambda: row.encode(tensors, options, seed=0, share=1.0))
        decoded, found = timed(lambda parts=parts: dict(row.decode(parts, shapes, options, "the benchmark", share=1.0)))
        if turn:
            for step, taken in (("copy", copied), ("encode", encoded), ("decode", decoded)):
                seconds[step].append(taken)
    square = sum(float(tensor.double().square().sum()) for tensor in tensors.values())
    lost = sum(float((found[key] - tensor).double().square().sum()) for key, tensor in tensors.items())
    return {
        **{f"{step}_mb_per_s": spread([4e-6 * count / taken for taken in times]) for step, times in seconds.items()},
        **{
            f"{step}_times_of_copy": spread([a / b for a, b in zip(seconds[step], seconds["copy"], strict=True)])
            for step in ("encode", "decode")
        },
        "bits": round(8 * sum(part.numel() * part.itemsize for part in parts.values()) / count, 4),
        "error": round((lost / square) ** 0.5, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    import torch

    from fedproxy.artifacts import versions, write_json

    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    size = arguments.parameters // 100
    tensors = {f"layer.{k:03}": torch.randn(size, generator=generator) for k in range(100)}
    rows = {label: measured(tensors, name, given, arguments.repeats) for label, (name, given) in ROWS.items()}
    least = min(rows[name][f"{way}_mb_per_s"]["median"] for name in ("int8", "int4") for way in ("encode", "decode"))
    record = {
        "parameters": 100 * size,
        "repeats": arguments.repeats,
        "rows": rows,
        "limit_mb_per_s": LIMIT,
        "within_limit": least >= LIMIT,
        "commit": commit(),
        "versions": versions(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, record)
    print(json.dumps(record, indent=2))
    if not record["within_limit"]:
        raise SystemExit(f"int8 or int4 ran at {least} MB/s; the limit is {LIMIT}.")


if __name__ == "__main__":
    main()
