"""Speed, memory and scale of the merge of H-TIES with its analysis, and what its compiled kernels are worth.

    python benchmarks/merge_engine.py [--part speed|scale|torch|torch_files|all] [--clients 8] [--parameters 40000000] [--repeats 5]
        [--reference-repeats 3] [--threads 2] [--scale-clients 32 64 128 256] [--scale-parameters 10000000]
        [--scale-repeats 3] [--torch-clients 64] [--directory DIR]

speed: float32 updates in memory. One process takes turns at reading all inputs once on all threads (a sum), merging,
merging with the conflict, and a straightforward torch implementation (stack, stable argsort, masks), so that each
ratio compares neighbours in time. What is kept and merged is compared with the straightforward one in float64. Peak
memory is taken in a process of its own, above what it held before: the inputs, and the loaded kernels.

scale: bfloat16 updates in mapped files, a different random one for each client; each merge from files to a file in a
process of its own, which first reads the files once, plainly, on as many threads. The times are fitted by a line in the
number of clients, and by a parabola, since the matrix of dot products has a pair of clients an entry.

torch, torch_files: our own walks in torch, which run where the kernels cannot, and the kernels: one process takes turns
at both, on the updates of speed, and on as many files as --torch-clients says of those of scale. The C library is told
to keep what is freed, or torch's walks take up to seven times as long.

Writes benchmarks/results/merge_engine.json; a part that is not run keeps its figures. A limit that is missed is said.
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import commit, resident, spread

LIMITS = {
    "speedup_over_reference": 20.0,
    "times_of_one_read": 10.0,
    "memory_beyond_inputs": 0.25,
    "value_error": 1e-6,
    "scale_peak_bytes": 1e9,
    "line_r_squared": 0.995,
    "line_largest_deviation": 0.1,
    "kernels_over_torch": 4.0,
}
RESULTS = Path(__file__).parent / "results" / "merge_engine.json"


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cpu_seconds(work: Callable[[], object]) -> float:
    """Time of all threads, without what others took of the machine in between."""
    began = time.process_time()
    work()
    return time.process_time() - began


@contextlib.contextmanager
def kernels_from(values: int) -> Iterator[None]:
    """Let the kernels run from so many values of all updates on."""
    from fedproxy.aggregation.merge import kernels

    least, kernels.SMALLEST = kernels.SMALLEST, values
    try:
        yield
    finally:
        kernels.SMALLEST = least


def made(clients: int, parameters: int) -> list[dict[str, Any]]:
    """Random updates of 100 tensors and a rest, with a common part and different lengths."""
    import torch

    common = torch.randn(parameters, generator=torch.Generator().manual_seed(0))
    sizes = [parameters // 100] * 100 + [parameters % 100]
    updates = []
    for k in range(clients):
        values = torch.randn(parameters, generator=torch.Generator().manual_seed(k + 1)).mul_(1.0 + 0.1 * k)
        values.add_(common, alpha=0.5)
        parts = values.split_with_sizes(sizes)
        updates.append({f"layer.{i:03}": part.clone() for i, part in enumerate(parts) if len(part)})
    return updates


def load_kernels() -> None:
    """Compile the kernels, or load them from their cache."""
    import torch

    from fedproxy.aggregation.merge import merge_round

    with kernels_from(0):
        for dtype in (torch.float32, torch.bfloat16):
            merge_round([{"w": torch.randn(100).to(dtype)} for _ in range(3)], r0=0.5)


def reader(updates: list[dict[str, Any]], threads: int) -> Callable[[], float]:
    """A read of all values once, on all threads, in four streams each (a plain loop is bound by its additions)."""
    import numba
    import numpy as np

    @numba.njit(nogil=True, fastmath=True)
    def total(values: Any) -> Any:
        quarter = len(values) // 4
        a = b = c = d = np.float32(0.0)
        for i in range(quarter):
            a += values[i]
            b += values[quarter + i]
            c += values[2 * quarter + i]
            d += values[3 * quarter + i]
        return a + b + c + d

    whole = [tensor.numpy() for update in updates for tensor in update.values()]
    stretches = [values[i : i + (1 << 20)] for values in whole for i in range(0, len(values), 1 << 20)]
    shares = [stretches[i * len(stretches) // threads : (i + 1) * len(stretches) // threads] for i in range(threads)]
    total(stretches[-1])
    pool = ThreadPoolExecutor(threads)
    return lambda: sum(pool.map(lambda share: sum(float(total(stretch)) for stretch in share), shares))


def straightforward(updates: list[dict[str, Any]], wide: bool = False) -> tuple[Any, Any]:
    """H-TIES as one would write it in torch: the merged vector, and which entries each client keeps.

    Args:
        updates: One mapping a client.
        wide: Compute the masses in float64, in place of the updates' float32.
    """
    import math

    import torch

    stack = torch.stack([torch.cat([update[name].reshape(-1) for name in sorted(update)]) for update in updates])
    count, length = stack.shape
    double = stack.double()
    gram = double @ double.T
    norms = gram.diagonal().sqrt()
    similarity = gram / (norms[:, None] * norms[None])
    if not wide:
        del double
    others = similarity - torch.eye(count, dtype=torch.float64)
    heterogeneity = 1 - others.clamp(min=0).sum(dim=1) / (count - 1)
    weights = torch.softmax(others.abs().sum(dim=1), dim=0)
    scaled = (heterogeneity - heterogeneity.min()) / (heterogeneity.max() - heterogeneity.min())
    conflict = 1 - stack.sign().sum(dim=0).abs() / count
    conflict.mean().item()
    torch.histc(conflict, bins=count + 1, min=0.0, max=1.0)
    del conflict
    kept = torch.zeros(stack.shape, dtype=torch.bool)
    for k, share in enumerate((1.0 - 0.2 * scaled).tolist()):
        order = torch.argsort(stack[k].abs(), descending=True, stable=True)
        kept[k, order[: math.floor(share * length + 1e-9)]] = True
    if wide:
        stack = double
    column = weights[:, None].to(stack.dtype)
    weighted = stack * kept * column
    positive, negative = weighted > 0, weighted < 0
    p, n = (weighted * positive).sum(dim=0), -(weighted * negative).sum(dim=0)
    up = (p >= 1.1 * n) & (p > 0)
    down = ~up & (n >= 1.1 * p) & (n > 0)
    merged = torch.zeros_like(p)
    merged[up] = (p / (positive * column).sum(dim=0))[up]
    merged[down] = (-n / (negative * column).sum(dim=0))[down]
    return merged, kept


def compared(updates: list[dict[str, Any]]) -> dict[str, Any]:
    """The merge against the straightforward one in float64."""
    import torch

    from fedproxy.aggregation.analyse import analyse
    from fedproxy.aggregation.merge import kernels, merge
    from fedproxy.aggregation.merge.top_k import kept_count, trimmed

    merged, kept = straightforward(updates, wide=True)
    found, analysis = merge(updates, "h-ties")
    error = (torch.cat([found[name] for name in sorted(found)]).double() - merged).abs().max() / merged.abs().max()
    engine = kernels.kernels_for(updates)
    if engine is None:
        raise SystemExit("The kernels are not in use: install numba, or give more parameters.")
    keep = [kept_count(share, analysis.parameters) for share in analyse(updates).retention]
    start, different = 0, 0
    for _, values in trimmed(updates, engine.select(keep).thresholds):
        different += int(((values != 0) != kept[:, start : start + values.shape[1]]).sum())
        start += values.shape[1]
    return {"parameters": start, "value_error": float(error), "entries_kept_differently": different}


def speed(job: dict[str, Any]) -> dict[str, Any]:
    """Alternating times of a read, the merge and the straightforward one."""
    import torch

    from fedproxy.aggregation.merge import merge, merge_round

    torch.set_num_threads(job["threads"])
    load_kernels()
    updates = made(job["clients"], job["parameters"])
    read = reader(updates, job["threads"])
    works: dict[str, Callable[[], object]] = {
        "read": read,
        "merge": lambda: merge(updates, "h-ties"),
        "merge_with_conflict": lambda: merge_round(updates, "h-ties"),
    }
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in (*works, "reference")}
    cpu: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(job["repeats"]):
        for name, work in works.items():
            cpu[name].append(cpu_seconds(lambda work=work, name=name: taken[name].append(seconds(work))))
        if repeat < job["reference_repeats"]:
            taken["reference"].append(seconds(lambda: straightforward(updates)))
    pairs = zip(taken["reference"], taken["merge"], strict=False)
    return {
        "seconds": {name: spread(values, 4) for name, values in taken.items()},
        "times_of_one_read": spread([m / r for m, r in zip(taken["merge"], taken["read"], strict=True)], 4),
        "with_conflict_times_of_one_read": spread(
            [m / r for m, r in zip(taken["merge_with_conflict"], taken["read"], strict=True)], 4
        ),
        "cpu_times_of_one_read": spread([m / r for m, r in zip(cpu["merge"], cpu["read"], strict=True)], 4),
        "speedup_over_reference": spread([slow / fast for slow, fast in pairs], 4),
        "read_bytes_per_second": round(4 * job["clients"] * job["parameters"] / statistics.median(taken["read"])),
    }


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of a merge in memory, with the conflict and without."""
    import torch

    from fedproxy.aggregation.merge import merge, merge_round

    torch.set_num_threads(job["threads"])
    before_kernels = resident("VmRSS")
    load_kernels()
    kernels = resident("VmRSS") - before_kernels
    updates = made(job["clients"], job["parameters"])
    inputs = sum(tensor.numel() * tensor.element_size() for update in updates for tensor in update.values())
    found: dict[str, Any] = {"inputs_bytes": inputs, "kernels_bytes": kernels}
    for name, work in (("merge", merge), ("merge_with_conflict", merge_round)):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        baseline = resident("VmRSS")
        result = work(updates, "h-ties")
        found[name] = round((resident("VmHWM") - baseline) / inputs, 4)
        del result
    return found


def read_files(paths: list[Path], threads: int) -> None:
    """Read files once, plainly, each thread into a buffer of its own."""

    def read(share: list[Path]) -> None:
        buffer = bytearray(1 << 20)
        for path in share:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, [paths[i::threads] for i in range(threads)]))


def from_files(job: dict[str, Any]) -> dict[str, Any]:
    """One merge from files to a file."""
    import torch

    from fedproxy.federation.merge_files import merge_files

    torch.set_num_threads(job["threads"])
    load_kernels()
    ready = resident("VmRSS")
    paths = [Path(path) for path in job["paths"]]
    read = seconds(lambda: read_files(paths, job["threads"]))
    taken: list[float] = []
    work = lambda: merge_files(paths, Path(job["out"]), "h-ties", overwrite=True)  # noqa: E731
    cpu = cpu_seconds(lambda: taken.append(seconds(work)))
    return {"read_seconds": read, "seconds": taken[0], "cpu_seconds": cpu, "ready": ready, "peak": resident("VmHWM")}


def torch_and_kernels(job: dict[str, Any]) -> dict[str, Any]:
    """Alternating times of our own walks in torch and of the kernels, in memory or from files to a file."""
    import torch

    from fedproxy.aggregation.merge import merge
    from fedproxy.federation.merge_files import merge_files

    torch.set_num_threads(job["threads"])
    load_kernels()
    if "paths" in job:
        paths = [Path(path) for path in job["paths"]]
        work: Callable[[], object] = lambda: merge_files(paths, Path(job["out"]), "h-ties", overwrite=True)  # noqa: E731
    else:
        updates = made(job["clients"], job["parameters"])
        work = lambda: merge(updates, "h-ties")  # noqa: E731
    taken: dict[str, list[float]] = {"kernels": [], "torch": []}
    work()
    for _ in range(job["repeats"]):
        for name, least in (("kernels", 0), ("torch", 1 << 62)):
            with kernels_from(least):
                taken[name].append(seconds(work))
    ratios = [slow / fast for slow, fast in zip(taken["torch"], taken["kernels"], strict=True)]
    return {**{name: spread(values, 4) for name, values in taken.items()}, "kernels_over_torch": spread(ratios, 4)}


def make_files(directory: Path, clients: int, parameters: int) -> list[Path]:
    """A different random bfloat16 update in a file for each client."""
    import torch

    from fedproxy.tensor_files import save_tensors

    need, free = 2 * parameters * (clients + 1), shutil.disk_usage(directory).free
    if need > 0.8 * free:
        raise SystemExit(f"{directory}: {need:,} bytes are needed, {free:,} are free. Give another --directory.")
    sizes = [parameters // 100] * 100 + [parameters % 100]
    common, paths = torch.randn(parameters, generator=torch.Generator().manual_seed(0)), []
    for k in range(clients):
        values = torch.randn(parameters, generator=torch.Generator().manual_seed(k + 1)).mul_(1 + k / clients)
        parts = values.add_(common, alpha=0.5).to(torch.bfloat16).split_with_sizes(sizes)
        paths.append(directory / f"client{k:04}.safetensors")
        save_tensors(paths[-1], {f"layer.{i:03}": part.contiguous() for i, part in enumerate(parts) if len(part)})
    return paths


def fitted(clients: list[int], times: list[float]) -> dict[str, Any]:
    """Line and parabola through the times."""
    import numpy as np

    x, y = np.array(clients, dtype=float), np.array(times)
    found: dict[str, Any] = {}
    for name, degree in (("line", 1), ("parabola", 2)):
        coefficients = np.polyfit(x, y, degree)
        rest = y - np.polyval(coefficients, x)
        found[name] = {
            "seconds_by_power_of_clients": [float(f"{c:.4g}") for c in coefficients[::-1]],
            "r_squared": round(1 - float((rest**2).sum() / ((y - y.mean()) ** 2).sum()), 5),
            "largest_deviation": round(float(np.abs(rest / y).max()), 4),
        }
    return found


def child(kind: str, job: dict[str, Any], **environment: str) -> dict[str, Any]:
    """Run one job in a process of its own, with these variables in its environment."""
    command = [sys.executable, __file__, "--child", json.dumps({"kind": kind, **job})]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def speed_part(arguments: argparse.Namespace) -> dict[str, Any]:
    job = {
        "clients": arguments.clients,
        "parameters": arguments.parameters,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "reference_repeats": arguments.reference_repeats,
    }
    times, used = child("speed", job), child("memory", job)
    checked = child("compare", {**job, "parameters": min(arguments.parameters, arguments.compare_parameters)})
    beyond = max(used["merge"], used["merge_with_conflict"])
    return {
        "job": job,
        **times,
        "memory_beyond_inputs": used,
        "compared": checked,
        "within_limits": {
            "speedup_over_reference": times["speedup_over_reference"]["median"] >= LIMITS["speedup_over_reference"],
            "times_of_one_read": times["times_of_one_read"]["median"] <= LIMITS["times_of_one_read"],
            "memory_beyond_inputs": beyond <= LIMITS["memory_beyond_inputs"],
            "value_error": checked["value_error"] <= LIMITS["value_error"] and not checked["entries_kept_differently"],
        },
    }


def scale_part(arguments: argparse.Namespace) -> dict[str, Any]:
    counts = sorted(arguments.scale_clients)
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        paths = [str(path) for path in make_files(Path(directory), counts[-1], arguments.scale_parameters)]
        for _ in range(arguments.scale_repeats):
            for count in counts:
                job = {"paths": paths[:count], "out": str(Path(directory) / "merged"), "threads": arguments.threads}
                runs[count].append(child("files", job))
    rows = [
        {
            "clients": count,
            "seconds": spread([run["seconds"] for run in found], 4),
            "cpu_seconds": spread([run["cpu_seconds"] for run in found], 4),
            "read_seconds": spread([run["read_seconds"] for run in found], 4),
            "times_of_one_read": spread([run["seconds"] / run["read_seconds"] for run in found], 4),
            "peak_bytes": max(run["peak"] for run in found),
            "ready_bytes": max(run["ready"] for run in found),
        }
        for count, found in runs.items()
    ]
    fit = fitted(counts, [row["seconds"]["median"] for row in rows])
    return {
        "job": {
            "parameters": arguments.scale_parameters,
            "repeats": arguments.scale_repeats,
            "threads": arguments.threads,
        },
        "runs": rows,
        "fit": fit,
        "fit_of_cpu_seconds": fitted(counts, [row["cpu_seconds"]["median"] for row in rows]),
        "within_limits": {
            "scale_peak_bytes": all(row["peak_bytes"] <= LIMITS["scale_peak_bytes"] for row in rows),
            "line_r_squared": fit["line"]["r_squared"] >= LIMITS["line_r_squared"],
            "line_largest_deviation": fit["line"]["largest_deviation"] <= LIMITS["line_largest_deviation"],
        },
    }


def torch_part(arguments: argparse.Namespace) -> dict[str, Any]:
    job = {"clients": arguments.clients, "parameters": arguments.parameters, **turns(arguments)}
    return compared_with_torch(job, {})


def torch_files_part(arguments: argparse.Namespace) -> dict[str, Any]:
    job = {"clients": arguments.torch_clients, "parameters": arguments.scale_parameters, **turns(arguments)}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        paths = [str(path) for path in make_files(Path(directory), job["clients"], job["parameters"])]
        return compared_with_torch(job, {"paths": paths, "out": str(Path(directory) / "merged")})


def turns(arguments: argparse.Namespace) -> dict[str, int]:
    return {"threads": arguments.threads, "repeats": arguments.repeats}


def compared_with_torch(job: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    found = child("torch", {**job, **files}, MALLOC_MMAP_THRESHOLD_=str(1 << 31), MALLOC_TRIM_THRESHOLD_=str(1 << 33))
    worth = found["kernels_over_torch"]["median"] >= LIMITS["kernels_over_torch"]
    return {"job": job, **found, "within_limits": {"kernels_over_torch": worth}}


PARTS = {"speed": speed_part, "scale": scale_part, "torch": torch_part, "torch_files": torch_files_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--parameters", type=int, default=40_000_000)
    parser.add_argument("--compare-parameters", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference-repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--scale-clients", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--scale-parameters", type=int, default=10_000_000)
    parser.add_argument("--scale-repeats", type=int, default=3)
    parser.add_argument("--torch-clients", type=int, default=64)
    parser.add_argument("--directory", type=Path, help="where the files of the scale part go")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        job = json.loads(arguments.child)
        kinds = {"speed": speed, "memory": memory, "files": from_files, "torch": torch_and_kernels}
        if job["kind"] == "compare":
            print(json.dumps(compared(made(job["clients"], job["parameters"]))))
        else:
            print(json.dumps(kinds[job["kind"]](job)))
        return

    from fedproxy.artifacts import versions, write_json

    record: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name, part in PARTS.items():
        if arguments.part in (name, "all"):
            record[name] = {
                **part(arguments),
                "commit": commit(),
                "versions": versions(),
                "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
            }
            arguments.out.parent.mkdir(exist_ok=True)
            write_json(arguments.out, {**record, "limits": LIMITS})
            print(json.dumps(record[name], indent=2))
            missed = [limit for limit, held in record[name]["within_limits"].items() if not held]
            if missed:
                print(f"{name}: {', '.join(missed)} missed.", file=sys.stderr)


if __name__ == "__main__":
    main()
