"""Hand-out of a proxy against a plain copy of the same bytes through a loopback TLS socket.

    python benchmarks/handout.py [--bytes 1e9] [--repeats 3] [--work DIR]

Both sides of both are Python's `ssl`, end with the file synced, and take turns in the same run. The plain copy is one
socket and 256 KiB buffers, nothing hashed. Servers are processes of their own; resident memory above what the hand-out's
server held before its first client is its peak while one client fetches, and then three at once.
Needs about four times the bytes on disk. Writes benchmarks/results/handout.json.
"""

import argparse
import json
import os
import platform
import random
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import commit, resident, spread

LIMIT = 3.0
CLIENTS = 3
MEMORY_LIMIT = 64 << 20
BUFFER = 256 << 10
RESULTS = Path(__file__).parent / "results" / "handout.json"


def make_proxy(folder: Path, size: int) -> None:
    from fedproxy.artifacts import Manifest

    folder.mkdir()
    generator = random.Random(0)
    with open(folder / "model.safetensors", "wb") as file:
        while size > 0:
            size -= file.write(generator.randbytes(min(size, 8 << 20)))
    (folder / "config.json").write_text("{}")
    Manifest("proxy", "0" * 64, 2, [0]).write(folder)


def hand_out(work: Path) -> None:
    """The server of the hand-out: tells where it listens, and serves until its input ends."""
    from fedproxy.deployment.handout.parts import describe
    from fedproxy.deployment.handout.server import HandoutServer

    began = time.perf_counter()
    listing = describe(work / "proxy")
    seconds = time.perf_counter() - began
    certificate, key = work / "keys" / "server.crt", work / "keys" / "server.key"
    with HandoutServer(work / "proxy", listing, "127.0.0.1", 0, certificate, key, lambda name: True) as server:
        tokens = [server.issue(f"client{k}") for k in range(CLIENTS)]
        told = {"port": server.port, "tokens": tokens, "listing": listing.sha256, "describe_seconds": seconds}
        print(json.dumps(told), flush=True)
        sys.stdin.read()


def plain(work: Path) -> None:
    """The plain server: whoever connects gets the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(work / "keys" / "server.crt", work / "keys" / "server.key")
    buffer = memoryview(bytearray(BUFFER))
    with socket.create_server(("127.0.0.1", 0)) as door:
        print(json.dumps({"port": door.getsockname()[1]}), flush=True)
        while True:
            connection, _ = door.accept()
            with (
                context.wrap_socket(connection, server_side=True) as safe,
                open(work / "proxy" / "model.safetensors", "rb", buffering=0) as file,
            ):
                while count := file.readinto(buffer):
                    safe.sendall(buffer[:count])


def copy(work: Path, port: int, target: Path) -> float:
    """Take the plain copy in this process; returns its seconds."""
    began = time.perf_counter()
    context = ssl.create_default_context(cafile=str(work / "keys" / "ca.crt"))
    buffer = memoryview(bytearray(BUFFER))
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as safe,
        open(target, "wb", buffering=0) as file,
    ):
        while count := safe.recv_into(buffer):
            file.write(buffer[:count])
        os.fsync(file.fileno())
    return time.perf_counter() - began


def fetch(work: Path, told: dict[str, Any], number: int) -> float:
    """Fetch the proxy in this process; returns its seconds."""
    from fedproxy.deployment.handout.fetch import fetch_proxy

    began = time.perf_counter()
    fetch_proxy(
        f"https://127.0.0.1:{told['port']}",
        told["tokens"][number],
        told["listing"],
        work / f"cache{number}",
        (work / "keys" / "ca.crt").read_bytes(),
    )
    return time.perf_counter() - began


def started(role: str, work: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--role", role, "--work", str(work), *more]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def told_by(process: subprocess.Popen[str]) -> Any:
    line = process.stdout.readline()  # type: ignore[union-attr]
    if not line:
        raise SystemExit("a process of the benchmark ended early")
    return json.loads(line)


def fetch_at_once(work: Path, told: dict[str, Any], count: int) -> list[float]:
    """Fetch in so many processes side by side."""
    clients = [started("fetch", work, "--told", json.dumps(told), "--number", str(k)) for k in range(count)]
    found = [told_by(client) for client in clients]
    for client in clients:
        client.communicate()
    return found


def measured(work: Path, size: int, repeats: int) -> dict[str, Any]:
    from fedproxy.deployment.keys import init_keys

    init_keys(work / "keys")
    make_proxy(work / "proxy", size)
    os.sync()
    servers = started("hand-out", work), started("plain", work)
    try:
        told, plain_port = told_by(servers[0]), told_by(servers[1])["port"]
        baseline = resident("VmRSS", servers[0].pid)
        copies, fetches = [], []
        for turn in range(repeats + 1):  # the first turn warms up both, and does not count
            copies.append(copy(work, plain_port, work / "copy"))
            (work / "copy").unlink()
            fetches += fetch_at_once(work, told, 1)
            shutil.rmtree(work / "cache0")
            print(f"turn {turn}: copy {copies[-1]:.2f} s, hand-out {fetches[-1]:.2f} s", file=sys.stderr)
        one = resident("VmHWM", servers[0].pid) - baseline
        together = fetch_at_once(work, told, CLIENTS)
        several = resident("VmHWM", servers[0].pid) - baseline
    finally:
        for server in servers:
            server.kill()
            server.communicate()
    ratios = [fetched / copied for fetched, copied in zip(fetches[1:], copies[1:], strict=True)]
    return {
        "bytes": size,
        "plain_copy_seconds": spread(copies[1:], 3),
        "handout_seconds": spread(fetches[1:], 3),
        "ratio": spread(ratios, 3),
        "limit": LIMIT,
        "within_limit": statistics.median(ratios) <= LIMIT,
        "clients_at_once": CLIENTS,
        "clients_at_once_seconds": round(max(together), 3),
        "describe_seconds": round(told["describe_seconds"], 3),
        "server_memory": {"baseline": baseline, "peak_above_1_client": one, "peak_above_3_clients": several},
        "server_memory_limit": MEMORY_LIMIT,
        "server_memory_within_limit": several <= MEMORY_LIMIT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=1e9)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder on the disk to measure; a temporary one by default")
    for name in ("--role", "--told", "--number"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "hand-out":
        hand_out(arguments.work)
    elif arguments.role == "plain":
        plain(arguments.work)
    elif arguments.role == "fetch":
        print(fetch(arguments.work, json.loads(arguments.told), int(arguments.number)), flush=True)
    else:
        from fedproxy.artifacts import versions, write_json

        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            found = measured(Path(folder), int(arguments.bytes), arguments.repeats)
        python = {"python": platform.python_version(), "openssl": ssl.OPENSSL_VERSION}
        hardware = {"machine": platform.machine(), "cpus": os.cpu_count()}
        record = {**found, "commit": commit(), "versions": {**versions(), **python}, "hardware": hardware}
        RESULTS.parent.mkdir(exist_ok=True)
        write_json(RESULTS, record)
        print(json.dumps(record, indent=2))
        if not (record["within_limit"] and record["server_memory_within_limit"]):
            raise SystemExit(
                f"The hand-out took {found['ratio']['median']} times the plain copy; the limit is {LIMIT}."
            )


if __name__ == "__main__":
    main()
