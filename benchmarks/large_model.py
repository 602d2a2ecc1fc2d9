"""Compress and fuse a LLaMA-2-7B-shaped checkpoint: throughput against `cp`, and peak memory.

    python benchmarks/large_model.py --work DIR [--like llama-2-7b] [--repeats 3]

A random checkpoint of that shape (bf16) is made in a temporary folder of DIR, which needs three times its size free and
is left as it was. Measured are, each in a process of its own that imports first and then starts the clock:

- removing half of the blocks, by `prune` against `cp` of the same proxy, and once by the whole of `fedproxy.compress`;
- scoring blocks on 8 documents of 128 tokens, out of core;
- fusing an adapter (r = 32, all linear layers of the kept blocks) to a checkpoint, against `cp` of the LLM;
- re-keying that adapter for the untouched LLM, by the function and by the whole command.

Ours and `cp` take turns, and both are done when what they wrote is synced to the disk. Before each turn the page cache
is dropped where that is allowed; elsewhere the files read are advised out of it. The throughput of the same turn is
compared; the median over the turns counts. Memory is the process's peak resident set (VmHWM), libraries included.
Writes benchmarks/results/large_model.json.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measuring import commit, resident

HERE = Path(__file__).parent
SYNTHETIC = HERE.parent / "scripts" / "make_synthetic_llm.py"
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
REMOVE, RANK, ALPHA = 0.5, 32, 64
SAMPLES, TOKENS = 8, 128
GB = 10**9
LIMITS = {
    "prune.throughput_relative_to_cp": (">=", 0.8),
    "prune.peak_rss": ("<=", 1.0 * GB),
    "compress.peak_rss": ("<=", 1.0 * GB),
    "score.peak_rss": ("<=", 3.0 * GB),
    "fuse.throughput_relative_to_cp": (">=", 0.5),
    "fuse.peak_rss": ("<=", 1.5 * GB),
    "rekey.seconds": ("<", 2.0),
}


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Do `work` and say what it took, in seconds and bytes; what was imported before counts for the memory only."""
    baseline = resident("VmRSS")
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "baseline_rss": baseline, "peak_rss": resident("VmHWM"), "ru_maxrss": maxrss}


def uniform_blocks(llm: Path) -> list[int]:
    """The blocks that are kept: evenly spread."""
    count = json.loads((llm / "config.json").read_text())["num_hidden_layers"]
    kept = count - int(REMOVE * count)
    return [i * count // kept for i in range(kept)]


def do_prune(llm: str, out: str) -> dict[str, float]:
    """Remove half of the blocks by the function that does nothing else."""
    from fedproxy.compression.prune import prune
    from fedproxy.models.source import open_source

    source, keep = open_source(llm), uniform_blocks(Path(llm))
    Path(out).mkdir()
    return timed(lambda: prune(source, keep, Path(out)))


def do_compress(llm: str, out: str) -> dict[str, float]:
    """Remove half of the blocks by the function that users call."""
    import fedproxy

    fedproxy.compress  # noqa: B018  the package imports what it needs when it is asked for
    return timed(lambda: fedproxy.compress(llm, out, remove=REMOVE, score="uniform", calibration=None))


def do_score(llm: str, text: str) -> dict[str, float]:
    """Score the blocks with one of them in memory at a time."""
    from fedproxy.compression.scores import SCORES
    from fedproxy.models.checkpoints import load_tokenizer
    from fedproxy.models.placement import open_stream
    from fedproxy.models.source import open_source
    from fedproxy.models.text_batches import batches
    from fedproxy.public_text import read_documents

    def work() -> None:
        stream = open_stream(open_source(llm), "stream")
        documents, _ = read_documents(Path(text))
        tokens = batches(load_tokenizer(llm), documents, max_length=TOKENS, batch_size=SAMPLES)
        assert [batch.input_ids.shape for batch in tokens] == [(SAMPLES, TOKENS)]
        passages = [stream.enter(batch.input_ids, batch.attention_mask) for batch in tokens]
        most = len(stream) - len(uniform_blocks(Path(llm)))
        SCORES["block-influence"].score(
            stream, passages, most=most, among=range(len(stream)), seed=0, progress=lambda done: None
        )

    return timed(work)


def do_adapter(llm: str, out: str) -> dict[str, float]:
    """Write a random adapter of the proxy: LoRA on all linear layers of its blocks."""
    import torch

    from fedproxy.adapter_files import write_adapter
    from fedproxy.artifacts import Manifest
    from fedproxy.checkpoint_files import model_identity
    from fedproxy.layer_map import ADAPTER_PREFIX
    from fedproxy.models.checkpoints import load_skeleton
    from fedproxy.models.families import blocks, blocks_path, linear_layers

    keep, skeleton = uniform_blocks(Path(llm)), load_skeleton(llm)
    path, generator = blocks_path(skeleton), torch.Generator().manual_seed(0)
    tensors = {}
    for number, block in enumerate(keep):
        for name, layer in linear_layers(blocks(skeleton)[block]).items():
            outputs, inputs = layer.weight.shape
            stem = f"{ADAPTER_PREFIX}{path}.{number}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) * 1e-3
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.rpartition(".")[2] for name in linear_layers(blocks(skeleton)[0])}),
        "layers_to_transform": list(range(len(keep))),
        "layers_pattern": path.rpartition(".")[2],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    manifest = Manifest("proxy-adapter", model_identity(Path(llm)), len(blocks(skeleton)), keep)
    Path(out).mkdir()
    return timed(lambda: write_adapter(Path(out), config, tensors, manifest))


def do_fuse(llm: str, adapter: str, out: str, form: str) -> dict[str, float]:
    """Fuse the adapter into the LLM, as a checkpoint or as an adapter for it."""
    import fedproxy

    fedproxy.fuse  # noqa: B018  the package imports what it needs when it is asked for
    return timed(lambda: fedproxy.fuse(llm, adapter, out, form=form))


def do_copy(source: str, out: str) -> dict[str, float]:
    """`cp`, and then a sync of each file that it wrote."""

    def work() -> None:
        subprocess.run(["cp", "-r", source, out], check=True)
        for path in [*Path(out).iterdir(), Path(out), Path(out).parent]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    return timed(work)


JOBS: dict[str, Callable[..., dict[str, float]]] = {
    "prune": do_prune,
    "compress": do_compress,
    "score": do_score,
    "adapter": do_adapter,
    "fuse": do_fuse,
    "copy": do_copy,
}


def forget(sources: Sequence[Path]) -> str:
    """Write what is pending and take what will be read out of the page cache; says how."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
        return "dropped before each turn"
    except OSError:
        for file in (file for source in sources for file in source.iterdir()):
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        return "files read were advised out of it before each turn"


def measured(job: str, *arguments: Path | str, reads: Sequence[Path]) -> dict[str, float]:
    """Do a job in a fresh process, with a cold page cache."""
    forget(reads)
    command = [sys.executable, __file__, "--child", json.dumps([job, *map(str, arguments)])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{job:10} {found['seconds']:8.2f} s  {found['peak_rss'] / 1e6:8.0f} MB", file=sys.stderr, flush=True)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(turns: Sequence[dict[str, float]], copies: Sequence[dict[str, float]], size: int) -> dict[str, Any]:
    """What repeats of a job took, against the copies of the same turns."""
    ratios = [copy["seconds"] / turn["seconds"] for turn, copy in zip(turns, copies, strict=True)]
    return {
        "bytes": size,
        "throughput_relative_to_cp": spread(ratios),
        "seconds": [turn["seconds"] for turn in turns],
        "cp_seconds": [copy["seconds"] for copy in copies],
        "peak_rss": max(turn["peak_rss"] for turn in turns),
        "ru_maxrss": max(turn["ru_maxrss"] for turn in turns),
        "baseline_rss": max(turn["baseline_rss"] for turn in turns),
    }


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def bench_prune(work: Path, llm: Path, repeats: int) -> dict[str, Any]:
    """Compressing, and pruning against `cp` of the proxy."""
    proxy, out = work / "proxy", work / "out"
    turns: dict[str, list[dict[str, float]]] = {"copy": [], "prune": []}
    compress = measured("compress", llm, proxy, reads=[llm])
    for _ in range(repeats):
        for job, done in turns.items():
            source = proxy if job == "copy" else llm
            done.append(measured(job, source, out, reads=[source]))
            shutil.rmtree(out)
    size = size_of(proxy)
    shutil.rmtree(proxy)
    return {"prune": summary(turns["prune"], turns["copy"], size), "compress": compress}


def bench_score(work: Path, llm: Path) -> dict[str, Any]:
    """Scoring out of core."""
    text = work / "text.txt"
    text.write_text("\n\n".join(f"{number} " * TOKENS for number in range(SAMPLES)))
    return {"documents": SAMPLES, "tokens_each": TOKENS, **measured("score", llm, text, reads=[llm])}


def bench_fuse(work: Path, llm: Path, repeats: int) -> dict[str, Any]:
    """Fusing to a checkpoint against `cp` of the LLM, and re-keying."""
    adapter, out = work / "adapter", work / "out"
    measured("adapter", llm, adapter, reads=[llm])
    turns: dict[str, list[dict[str, float]]] = {"copy": [], "fuse": []}
    rekeyed, commands = [], []
    for _ in range(repeats):
        turns["copy"].append(measured("copy", llm, out, reads=[llm]))
        shutil.rmtree(out)
        turns["fuse"].append(measured("fuse", llm, adapter, out, "checkpoint", reads=[llm, adapter]))
        shutil.rmtree(out)
        rekeyed.append(measured("fuse", llm, adapter, out, "adapter", reads=[llm, adapter]))
        shutil.rmtree(out)
        began = time.perf_counter()
        command = [sys.executable, "-m", "fedproxy", "fuse", str(llm), str(adapter), str(out), "--as", "adapter"]
        subprocess.run(command, check=True, capture_output=True)
        commands.append(time.perf_counter() - began)
        shutil.rmtree(out)
    return {
        "fuse": summary(turns["fuse"], turns["copy"], size_of(llm)),
        "rekey": {
            "bytes": size_of(adapter),
            "seconds": statistics.median(turn["seconds"] for turn in rekeyed),
            "all_seconds": [turn["seconds"] for turn in rekeyed],
            "command_seconds": commands,
            "peak_rss": max(turn["peak_rss"] for turn in rekeyed),
        },
    }


def verdicts(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each limit, what was measured, and whether it holds."""
    found = {}
    for name, (sign, limit) in LIMITS.items():
        part, key = name.split(".")
        value = result[part][key]
        value = value["median"] if isinstance(value, dict) else value
        holds = {">=": value >= limit, "<=": value <= limit, "<": value < limit}[sign]
        found[name] = {"value": value, "sign": sign, "limit": limit, "within_limit": holds}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder on the disk to measure")
    parser.add_argument("--like", default="llama-2-7b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "large_model.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        job, *arguments = json.loads(args.child)
        print(json.dumps(JOBS[job](*arguments)))
        return
    if args.work is None:
        parser.error("--work is needed: a folder on the disk to measure")

    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        llm = work / "llm"
        began = time.perf_counter()
        subprocess.run([sys.executable, SYNTHETIC, llm, "--like", args.like], check=True, stdout=subprocess.DEVNULL)
        result: dict[str, Any] = {
            "like": args.like,
            "bytes": size_of(llm),
            "seconds_to_make": time.perf_counter() - began,
            "repeats": args.repeats,
            "page_cache": forget([llm]),
        }
        result |= bench_prune(work, llm, args.repeats)
        result["score"] = bench_score(work, llm)
        result |= bench_fuse(work, llm, args.repeats)

    from fedproxy.artifacts import write_json
    from fedproxy.run_directory import environment

    result["limits"] = verdicts(result)
    result["environment"] = {**environment(), "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}
    del result["environment"]["command"]  # it names a folder of this machine
    result["commit"] = commit()
    write_json(args.out, result)
    print(json.dumps(result["limits"], indent=2))
    if broken := [name for name, verdict in result["limits"].items() if not verdict["within_limit"]]:
        raise SystemExit(f"Not within the limit: {', '.join(broken)}.")


if __name__ == "__main__":
    main()
