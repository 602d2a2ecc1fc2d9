"""A training of two threads, alone and beside another process, as GNU OpenMP's idle threads wait and as ours do.

    python benchmarks/busy_machine.py --data DIR [--repeats 3]

DIR as of `training_loop.py`. The other process is a training of one thread in a session of its own, as from another
terminal: Linux shares processors among sessions, and may put both threads of the one on a processor. Each training is a
process of its own; ratios are within a turn. Writes benchmarks/results/busy_machine.json.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from measuring import spread

from fedproxy.artifacts import write_json
from fedproxy.idle_threads import TURNS
from fedproxy.run_directory import environment

HERE = Path(__file__).parent
LLM = HERE.parent / "src" / "fedproxy" / "demo" / "llm"
WAITS = {"GNU OpenMP's": 300_000, "ours": TURNS}
"""Turns of waiting before a thread sleeps; GNU OpenMP's is what it does by itself."""
STEPS, THREADS = 1, 2
SETTLES = 15
"""Seconds until the other process trains."""


def train(endless: bool) -> None:
    """Print the seconds of STEPS steps, once some were taken; or train until ended."""
    from training_loop import read

    from fedproxy.config import Train
    from fedproxy.models.checkpoints import load_tokenizer, padding
    from fedproxy.models.encoding import encode
    from fedproxy.models.trainable import load_alone
    from fedproxy.models.training import train as train_adapter

    settings = Train(batch_size=16, max_length=96, lora_dropout=0.0)
    tokenizer = load_tokenizer(LLM)
    examples = encode(read(Path(sys.argv[2]), 0, 20), tokenizer, max_length=settings.max_length)
    model = load_alone(LLM, settings, seed=0)

    def seconds(steps: int) -> float:
        return train_adapter(model, examples, settings, pad=padding(tokenizer), seed=0, steps=steps).seconds

    while endless:
        seconds(100)
    seconds(1)
    print(seconds(STEPS))


def process(data: Path, threads: int, wait: int, how: str) -> "subprocess.Popen[str]":
    variables = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": str(wait)}
    command = [sys.executable, __file__, how, str(data)]
    apart = how == "endless"
    return subprocess.Popen(
        command, env=os.environ | variables, stdout=subprocess.PIPE, text=True, start_new_session=apart
    )


@contextlib.contextmanager
def neighbour(data: Path) -> Iterator[None]:
    """Another process that trains with one thread meanwhile."""
    other = process(data, 1, TURNS, "endless")
    time.sleep(SETTLES)
    try:
        yield
    finally:
        other.kill()
        other.wait()


def measured(data: Path, wait: int) -> float:
    said, _ = process(data, THREADS, wait, "once").communicate()
    return float(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "busy_machine.json")
    args = parser.parse_args()
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(args.repeats):
        names = list(WAITS) if turn % 2 else [*reversed(WAITS)]
        for where in ("alone", "beside another"):
            with neighbour(args.data) if where != "alone" else contextlib.nullcontext():
                for name in names:
                    seconds.setdefault((where, name), []).append(measured(args.data, WAITS[name]))
    rows = []
    for where in ("alone", "beside another"):
        theirs, ours = (seconds[where, name] for name in WAITS)
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        rows.append({
            "where": where,
            "seconds": {name: spread(seconds[where, name], 2) for name in WAITS},
            "gnu_relative_to_ours": spread(ratios, 2),
        })  # fmt: skip
    result = {
        "steps": STEPS,
        "threads": THREADS,
        "cpus": os.cpu_count(),
        "repeats": args.repeats,
        "turns": WAITS,
        "rows": rows,
        "environment": environment(),
    }
    write_json(args.out, result)
    print(json.dumps({name: value for name, value in result.items() if name != "environment"}, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] in (["once"], ["endless"]):
        train(sys.argv[1] == "endless")
    else:
        main()
