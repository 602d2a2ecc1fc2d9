"""What a federation costs beyond its training: time a round in a deployment, memory of a simulation's server.

    python benchmarks/federation.py [--part deployment] [--part simulation]

deployment: a server and three clients over TLS on loopback, the demo's proxy. A round's overhead is its wall time less
the training time of its slowest client (a single step: three clients share the processors of one machine here, and would
wait for one another's training); the first round, which waits for clients, is left out.
simulation: Flower's simulation of the demo's LLM with 50 and with 200 clients, three rounds each; the peak memory of
every process of the server, with and without the pages of files that it has mapped.
The figures are of the release of Flower that is installed; those of another one stay beside them.
Every process has one thread. Writes benchmarks/results/federation.json.
"""

import argparse
import contextlib
import importlib.metadata as metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "federation.json"
DEMO = Path(__file__).parent.parent / "src" / "fedproxy" / "demo"
CLIENTS = {"bank": "demo_banking", "travel": "demo_travel", "assistant": "demo_snips"}
SERVER = {
    "flwr-simulation": "Flower's simulation with the ServerApp",
    "flower-superlink": "SuperLink",
    "flwr-serverapp": "ServerApp",
    "fedproxy serve": "gateway",
}
OVERHEAD_LIMIT = 2.0
COMMAND = [sys.executable, "-m", "fedproxy"]


def experiment(folder: Path, clients: str, rounds: int, batch_size: int) -> Path:
    """The demo's experiment with these clients."""
    path = folder / "experiment.toml"
    path.write_text(
        f'name = "benchmark"\nseed = 0\n[llm]\npath = "{DEMO / "llm"}"\n'
        f'[compress]\nremove = 0.5\ncalibration = "{DEMO / "calibration.txt"}"\nsamples = 64\nmax_length = 128\n'
        f"{clients}\n[train]\nbatch_size = {batch_size}\nlearning_rate = 3e-3\nmax_length = 96\nlora_r = 16\n"
        f"lora_alpha = 32\nlora_dropout = 0.0\n[federate]\nrounds = {rounds}\n"
    )
    return path


def write_rows(path: Path, task: str, rows: int) -> None:
    from fedproxy.evaluation import training_rows

    found = training_rows(task, data=None, include=DEMO / "tasks", limit=rows, seed=0)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def deployment(rounds: int, rows: int) -> dict[str, Any]:
    """Seconds of each round beyond its slowest client's training."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        tables = "".join(f'[[client]]\nname = "{name}"\n' for name in CLIENTS)
        file, keys = experiment(folder, tables, rounds, 16), folder / "keys"
        for name, task in CLIENTS.items():
            write_rows(folder / f"{name}.jsonl", task, rows)
        subprocess.run([*COMMAND, "keys", "init", str(keys)], check=True, capture_output=True)
        for name in CLIENTS:
            subprocess.run([*COMMAND, "keys", "add", str(keys), name], check=True, capture_output=True)
        log = folder / "serve.log"
        serve = [*COMMAND, "serve", str(file), "--out", str(folder / "run"), "--keys", str(keys), "--listen"]
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(started([*serve, "127.0.0.1:0"], log))
            address = ""
            while not address and server.poll() is None:
                time.sleep(0.2)
                found = log.read_text().partition("can join at ")[2]
                address = found.partition("\n")[0].rstrip(".") if "\n" in found else ""
            for name in CLIENTS:
                join = [*COMMAND, "join", address, "--data", str(folder / f"{name}.jsonl")]
                join += ["--min-rows", "1", "--min-steps", "1"]
                join += ["--key", str(keys / "clients" / f"{name}.key"), "--cache", str(folder / "cache" / name)]
                stack.enter_context(started(join, folder / f"{name}.log"))
            if server.wait(600) != 0:
                raise SystemExit(log.read_text())
        records = [
            json.loads((folder / "run" / "rounds" / f"{number:04d}" / "round.json").read_text())
            for number in range(2, rounds + 1)
        ]
    training = [max(client["seconds"] for client in record["clients"].values()) for record in records]
    beyond = [record["seconds"] - slowest for record, slowest in zip(records, training, strict=True)]
    return {
        "clients": len(CLIENTS),
        "rounds": [record["round"] for record in records],
        "round_seconds": [round(record["seconds"], 3) for record in records],
        "training_seconds": [round(value, 3) for value in training],
        "overhead_seconds": [round(value, 3) for value in beyond],
        "median": round(statistics.median(beyond), 3),
        "min": round(min(beyond), 3),
        "max": round(max(beyond), 3),
        "limit": OVERHEAD_LIMIT,
    }


class Memory(threading.Thread):
    """Looks at the memory of the server's processes below `root` while it runs."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.ending = root, threading.Event()
        self.peak: dict[str, int] = defaultdict(int)
        self.own: dict[str, int] = defaultdict(int)

    def run(self) -> None:
        """Look ten times a second until `ending` is set."""
        while not self.ending.wait(0.1):
            for process in below(self.root):
                with contextlib.suppress(OSError, ValueError):
                    self.look(process)

    def look(self, process: int) -> None:
        """Note the memory of a process, if it is one of the server's."""
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
        line = " ".join(Path(word).name for word in words[:5])
        kind = next((name for name in SERVER if name in line), None)
        if kind is None:
            return
        fields = dict(row.split(":", 1) for row in Path(f"/proc/{process}/status").read_text().splitlines())
        kilobytes = {name: int(fields[name].split()[0]) for name in ("VmHWM", "RssAnon")}
        self.peak[kind] = max(self.peak[kind], kilobytes["VmHWM"] * 1024)
        self.own[kind] = max(self.own[kind], kilobytes["RssAnon"] * 1024)


def below(root: int) -> list[int]:
    """A process and all that descend from it; sessions of their own do not hide them."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, ValueError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, new = {root}, {root}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)


def simulation(clients: int, rounds: int) -> dict[str, Any]:
    """Time and the server's peak memory of a simulation with so many clients."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        pool = folder / "pool.jsonl"
        write_rows(pool, "demo_travel", 600)
        lines = pool.read_text().splitlines(keepends=True)
        pool.write_text("".join(lines[i % len(lines)] for i in range(8 * clients)))
        table = f'[partition]\ndata = "{pool}"\nclients = {clients}\nscheme = "iid"\n'
        file = experiment(folder, table, rounds, 8)
        command = [*COMMAND, "federate", str(file), "--out", str(folder / "run"), "--engine", "simulation"]
        log = folder / "log"
        began = time.perf_counter()
        with started(command, log) as process:
            memory = Memory(process.pid)
            memory.start()
            code = process.wait(3600)
            memory.ending.set()
        if code != 0:
            raise SystemExit(log.read_text())
        records = [json.loads(path.read_text()) for path in sorted((folder / "run" / "rounds").glob("*/round.json"))]
    return {
        "clients": clients,
        "replies": [len(record["clients"]) for record in records],
        "seconds": round(time.perf_counter() - began, 1),
        "round_seconds": [round(record["seconds"], 1) for record in records],
        "update_bytes": next(iter(records[0]["clients"].values()))["bytes_up"],
        "peak_bytes": dict(sorted(memory.peak.items())),
        "peak_own_bytes": dict(sorted(memory.own.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=("deployment", "simulation"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--clients", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from fedproxy.artifacts import write_json
    from fedproxy.run_directory import environment

    result: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for part in arguments.part or ("deployment", "simulation"):
        if part == "deployment":
            found = deployment(arguments.rounds, arguments.rows)
            result.setdefault(part, {})[metadata.version("flwr")] = found
        else:
            result[part] = [simulation(clients, 3) for clients in arguments.clients]
        print(json.dumps({part: result[part]}), flush=True)
    write_json(arguments.out, {**result, "environment": {**environment(), "command": ["federation.py"]}})


if __name__ == "__main__":
    main()
