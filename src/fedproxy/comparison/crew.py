"""Cells that are run side by side: processes of this program, each of which takes a cell at a time.

    $ python -m fedproxy.comparison.crew DIR

reads a cell a line from its standard input, [{the method's row}, [method, seed, ratio]], and writes a line of JSON
for what it does: {"progress": [stage, fraction, text]}, {"done": seconds}, {"failed": [exit code, text]}. When its
input ends, so does it: that is when the process that started it has, however that was.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fedproxy.comparison.cells import Key, rows_by_seed, run_cell
from fedproxy.compression.exposure import exposure
from fedproxy.config import Experiment, load_experiment
from fedproxy.errors import FedproxyError, ResourceError, error_of, explained
from fedproxy.memory import available_memory
from fedproxy.methods import Method
from fedproxy.models.source import open_source
from fedproxy.models.training_memory import bytes_to_train

PROGRAM_BYTES = 1 << 30
"""What a process takes beside a training: measured 0.7 GB with torch, transformers and the harness loaded."""

OnCellProgress = Callable[[Key, str, float, str], None]
"""Told the cell, the stage, the fraction of it that is done, and what is being done."""
OnDone = Callable[[Key, float], None]
"""Told a cell that is complete, and its seconds."""
_Left = queue.SimpleQueue[tuple[Method, Key] | None]
_Said = queue.SimpleQueue[tuple[Key, dict[str, Any]] | None]


def processes(experiment: Experiment) -> int:
    """How many cells may run at once: a GPU takes one; else as many as there are processors, if memory suffices.

    Raises:
        ArtifactError: the LLM cannot be read.
    """
    if torch.cuda.is_available():
        return 1
    source = open_source(experiment.llm.path, trust_remote_code=experiment.llm.trust_remote_code)
    keep = list(range(source.count))
    parameters = exposure(source, keep)["parameters"]
    needed = PROGRAM_BYTES + bytes_to_train(source.decoder, keep, experiment.train, parameters)["cpu"]
    return max(1, min(len(os.sched_getaffinity(0)), available_memory() // needed))


def run_in_processes(
    path: Path, cells: Sequence[tuple[Method, Key]], jobs: int, on_progress: OnCellProgress, on_done: OnDone
) -> None:
    """Run cells in processes of their own, which share the processors.

    Args:
        path: The comparison's directory.
        cells: The cells and their methods, in the order in which they are begun.
        jobs: How many of them at once. Each has its share of the processors, also when fewer are left.
        on_progress: Told what is done.
        on_done: Told each cell that is complete.

    Raises:
        FedproxyError: what a cell raised, first of all; the others are ended.
        ResourceError: a process was killed.
    """
    left: _Left = queue.SimpleQueue()
    count = min(jobs, len(cells))
    for item in (*cells, *[None] * count):
        left.put(item)
    said: _Said = queue.SimpleQueue()
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(_worker(path, threads, left, said))
        working = count
        while working:
            message = said.get()
            if message is None:
                working -= 1
                continue
            key, what = message
            if "progress" in what:
                on_progress(key, *what["progress"])
            elif "done" in what:
                on_done(key, what["done"])
            else:
                raise error_of(*what["failed"])


@contextlib.contextmanager
def _worker(path: Path, threads: int, left: _Left, said: _Said) -> Iterator[None]:
    """A process, and a thread here that leads it; both are ended with the block."""
    variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **variables},
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C is for the process that leads
    )
    thread = threading.Thread(target=_lead, args=(process, left, said))
    thread.start()
    try:
        yield
    finally:
        process.kill()
        thread.join()


def _lead(process: "subprocess.Popen[str]", left: _Left, said: _Said) -> None:
    """Give a process one cell after the other, and pass on what it says."""
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        while (cell := left.get()) is not None:
            method, key = cell
            with contextlib.suppress(BrokenPipeError):
                os.write(process.stdin.fileno(), (json.dumps([asdict(method), key]) + "\n").encode())
            for line in process.stdout:
                what = json.loads(line)
                said.put((key, what))
                if "progress" not in what:
                    break
            else:
                text = (
                    f"The process that ran {key[0]}, seed {key[1]}, ended with code {process.wait()}. If memory ran "
                    "out, go on with --resume and fewer --jobs."
                )
                said.put((key, {"failed": [ResourceError.exit_code, text]}))
                return
    said.put(None)


def _work(path: Path) -> None:
    """Run the cells that standard input names."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no message
    orders: queue.SimpleQueue[tuple[Method, Key]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()

    def say(**what: Any) -> None:
        print(json.dumps(what), file=channel, flush=True)

    experiment = load_experiment(path / "experiment.toml")
    rows = rows_by_seed(experiment)
    while True:
        method, key = orders.get()
        try:
            say(done=run_cell(experiment, path, method, key, rows, lambda *told: say(progress=told)))
        except Exception as error:
            known = error if isinstance(error, FedproxyError) else explained(error)
            say(failed=[known.exit_code, str(known)])


def _listen(orders: "queue.SimpleQueue[tuple[Method, Key]]") -> None:
    """Take orders while there is somebody to give them."""
    for line in sys.stdin:
        method, (name, seed, remove) = json.loads(line)
        orders.put((Method(**method), (name, seed, remove)))
    os._exit(0)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
