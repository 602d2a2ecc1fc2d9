"""What a cell cost: bytes, operations, memory and time, from the records that its trainings left."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedproxy.adapter_files import WEIGHTS_FILE
from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import weight_files
from fedproxy.comparison.work import read_cost
from fedproxy.compression.realign import aligned_tokens, last_aligned
from fedproxy.config import LLM
from fedproxy.federation.aligning import ALIGNMENT
from fedproxy.federation.messages import size_in_bytes
from fedproxy.federation.store import RoundStore
from fedproxy.layer_map import split_name
from fedproxy.models.checkpoints import resolve
from fedproxy.models.costs import Matrices, matrices, reading, training
from fedproxy.run_directory import RunDirectory
from fedproxy.tensor_files import read_header

_matrices = functools.cache(matrices)


@dataclass(frozen=True)
class Spent:
    """What a client spent in all rounds: operations, bytes sent and got beside the proxy, and memory at its peak."""

    flops: float
    up: int
    down: int
    memory: int = 0


def costs(
    *,
    seconds: dict[str, Any],
    exposed: float = 0.0,
    proxy_bytes: int = 0,
    served: float = 0.0,
    clients: Sequence[Spent] = (),
    peak: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The part of a cell's record that says what it cost; what is not given was not spent.

    Args:
        seconds: By stage; none for a stage of which no record was left.
        exposed: Share of the LLM's parameters that left the house.
        proxy_bytes: Size of the proxy, which each client gets once.
        served: Operations of the server.
        clients: What each client spent.
        peak: Peak memory in bytes of "server" and "clients", as their processes were measured.
    """
    return {
        "exposed": exposed,
        "proxy_bytes": proxy_bytes,
        "bytes_up": sum(client.up for client in clients),
        "bytes_down": sum(client.down for client in clients),
        "flops": {
            "server": served,
            "clients": sum((client.flops for client in clients), 0.0),
            "client_most": max((client.flops for client in clients), default=0.0),
        },
        "peak_memory_bytes": peak or {"server": None, "clients": None},
        "seconds": seconds,
    }


def sent_once(bytes_up: Iterable[int]) -> dict[str, Any]:
    """What clients that train alone send, in place of what rounds would: the last adapter, and get but the proxy."""
    return {"bytes_up": sum(bytes_up), "bytes_down": 0}


def spent_by_owner(spent: Mapping[str, Any]) -> dict[str, Any]:
    """The costs where the rows travel, not the model: what was trained, the owner of the LLM trained."""
    peak = {"server": spent["peak_memory_bytes"]["clients"], "clients": None}
    return costs(seconds=spent["seconds"], served=spent["flops"]["clients"], peak=peak)


def costs_of_proxy(llm: LLM, proxy: Path, evaluating: float) -> dict[str, Any]:
    """What a proxy that nobody trained cost.

    Args:
        llm: The [llm] table.
        proxy: The proxy.
        evaluating: Seconds of scoring it.
    """
    made = read_cost(proxy)
    return costs(
        exposed=_share(proxy),
        proxy_bytes=_bytes(proxy),
        served=_healing(llm, proxy),
        peak={"server": made.get("peak_memory_bytes"), "clients": None},
        seconds={"compress": made.get("seconds"), "evaluate": evaluating},
    )


def costs_of_trainings(
    llm: LLM, runs: Sequence[RunDirectory], fused: Sequence[Path], evaluating: float
) -> dict[str, Any]:
    """What trainings on one proxy cost, all together, and which they are.

    Args:
        llm: The [llm] table.
        runs: The trainings.
        fused: What they learned, plugged into the LLM.
        evaluating: Seconds of scoring.
    """
    proxy = (runs[0].path / "proxy").resolve()
    made, fusing = read_cost(proxy), [read_cost(path) for path in fused]
    clients = [
        client for run in runs for client in _clients(run, _matrices(proxy, trust_remote_code=llm.trust_remote_code))
    ]
    served = [cost["peak_memory_bytes"] for cost in (made, *fusing) if cost]
    return {"trainings": [run.path.name for run in runs]} | costs(
        exposed=_share(proxy),
        proxy_bytes=_bytes(proxy),
        served=_healing(llm, proxy) + sum(_aligning(llm, run) for run in runs),
        clients=clients,
        peak={"server": max(served, default=None), "clients": max(client.memory for client in clients)},
        seconds={
            "compress": made.get("seconds"),
            "federate": sum(run.seconds().get("federate", 0.0) for run in runs),
            "fuse": sum(cost.get("seconds", 0.0) for cost in fusing),
            "evaluate": evaluating,
        },
    )


def _trained(run: RunDirectory) -> tuple[set[int], int]:
    """The proxy blocks that clients train, and the number of entries that they train."""
    shapes = {name: entry[1] for name, entry in read_header(run.path / "adapter" / WEIGHTS_FILE).entries.items()}
    return {split_name(name)[1] for name in shapes}, sum(map(math.prod, shapes.values()))


def _clients(run: RunDirectory, proxy: Matrices) -> list[Spent]:
    """What each client of a training spent; what aligned the proxy goes to it with every round but the first."""
    blocks, entries = _trained(run)
    aligned = size_in_bytes(last_aligned(run.path / ALIGNMENT))
    found: dict[str, list[dict[str, Any]]] = {}
    for record in RoundStore(run.path / "rounds").records():
        extra = aligned if record["round"] > 1 else 0
        for name, client in record["clients"].items():
            found.setdefault(name, []).append({**client, "bytes_down": client["bytes_down"] + extra})
    return [
        Spent(
            flops=sum(training(r["tokens"], proxy, trained=blocks, parameters=entries) for r in rounds),
            up=sum(r["bytes_up"] for r in rounds),
            down=sum(r["bytes_down"] for r in rounds),
            memory=max(r["peak_memory_bytes"] for r in rounds),
        )
        for rounds in found.values()
    ]


def _aligning(llm: LLM, run: RunDirectory) -> float:
    """Operations of aligning the proxy between rounds: the LLM reads, the blocks that clients do not train learn."""
    tokens, extra = aligned_tokens(run.path / ALIGNMENT), last_aligned(run.path / ALIGNMENT)
    if not tokens:
        return 0.0
    proxy = _matrices((run.path / "proxy").resolve(), trust_remote_code=llm.trust_remote_code)
    others, entries = set(range(len(proxy.blocks))) - _trained(run)[0], sum(map(torch.numel, extra.values()))
    return reading(tokens, _whole(llm)) + training(tokens, proxy, trained=others, parameters=entries)


def _healing(llm: LLM, proxy: Path) -> float:
    """Operations of healing: the LLM reads all documents; the proxy reads them twice if refitted, and learns."""
    made, spent = Manifest.read(proxy).settings, 0.0
    if "refit" not in made and "heal" not in made:
        return spent
    model = _matrices(proxy, trust_remote_code=llm.trust_remote_code)
    if record := made.get("refit"):
        spent += reading(record["tokens"], _whole(llm)) + 2 * reading(record["tokens"], model)
    if record := made.get("heal"):
        settings = record["settings"]
        passes = settings["steps"] / math.ceil(record["documents"] / settings["batch_size"])
        spent += reading(record["tokens"], _whole(llm))
        spent += training(passes * record["tokens"], model, trained=record["trained"], parameters=record["parameters"])
    return spent


def _whole(llm: LLM) -> Matrices:
    return _matrices(resolve(llm.path), trust_remote_code=llm.trust_remote_code)


def _share(proxy: Path) -> float:
    return float(Manifest.read(proxy).settings["exposure"]["share"])


def _bytes(proxy: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(proxy))
