"""What came of a run, as results.json keeps it."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from fedproxy.artifacts import Manifest, read_json
from fedproxy.checkpoint_files import model_identity, weight_files
from fedproxy.compression.exposure import healed_perplexity
from fedproxy.config import Experiment
from fedproxy.federation.store import RoundStore
from fedproxy.memory import peak_memory
from fedproxy.metrics import gap_closed
from fedproxy.models.checkpoints import resolve
from fedproxy.run_directory import RunDirectory
from fedproxy.tensor_files import read_header
from fedproxy.typed_json import LARGEST


def results_of(
    experiment: Experiment, directory: RunDirectory, evaluation: dict[str, Any], held_back: dict[str, Any]
) -> dict[str, Any]:
    """Gather results.json from what a run has written.

    Args:
        experiment: The experiment.
        directory: The run, complete.
        evaluation: The scores of its models.
        held_back: What the LLM reaches on rows that clients keep back, as of `score_llm`.
    """
    path, llm = directory.path, resolve(experiment.llm.path)
    proxy = Manifest.read(path / "proxy")
    rounds = RoundStore(path / "rounds").records()
    replies = [client for record in rounds for client in record["clients"].values()]
    return {
        "name": experiment.name,
        "seed": experiment.seed,
        "llm": {
            "path": experiment.llm.path,
            "blocks": proxy.llm_blocks,
            "parameters": _count_parameters(llm),
            "sha256": model_identity(llm),
        },
        "proxy": {
            "blocks": len(proxy.layer_map),
            "parameters": _count_parameters(path / "proxy"),
            "perplexity": _perplexity(proxy.settings),
            "layer_map": proxy.layer_map,
            "scores": proxy.scores,
        },
        "evaluation": evaluation,
        "gap_closed": gap_closed(evaluation),
        "validation": held_back,
        "rounds": rounds,
        "kept_round": Manifest.read(path / "adapter").settings.get("round"),
        "cost": {
            "seconds": directory.seconds(),
            "bytes_up": sum(client["bytes_up"] for client in replies),
            "bytes_down": sum(client["bytes_down"] for client in replies),
            "proxy_bytes": sum(file.stat().st_size for file in weight_files(path / "proxy")),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory(),
        },
        "environment": read_json(path / "environment.json"),
        "experiment": experiment.as_dict(),
    }


def _perplexity(settings: Mapping[str, Any]) -> dict[str, float] | None:
    """Of the LLM and of the proxy as it was handed out, on public text; none if there was none."""
    measured, proxy = healed_perplexity(settings), "after"
    if measured is None:
        measured, proxy = settings.get("exposure", {}).get("perplexity"), "proxy"
    return measured and {"llm": min(measured["llm"], LARGEST), "proxy": min(measured[proxy], LARGEST)}


def _count_parameters(checkpoint: Path) -> int:
    return sum(
        prod(shape) for file in weight_files(checkpoint) for _, shape, _, _ in read_header(file).entries.values()
    )
