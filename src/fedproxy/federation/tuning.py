"""Stage two: the rounds in which clients tune the proxy, for whatever engine carries them, and their adapter."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedproxy.artifacts import Manifest, new_directory, read_json
from fedproxy.config import Experiment, load_experiment
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.messages import Closed
from fedproxy.federation.rounds import Exchange, drive
from fedproxy.federation.store import RoundStore
from fedproxy.models.lora import (
    CONFIG_FILE,
    AdaptedModel,
    adapter_state,
    read_adapter,
    write_adapter,
)
from fedproxy.models.trainable import load_trainable
from fedproxy.models.training import optimizer_steps
from fedproxy.run_directory import RunDirectory, has_members

_log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
OnProgress = Callable[[str, float, str], None]
"""Told the stage, the fraction of it that is done, and what is being done."""

START, CLIENTS = "start", "clients"
"""RUN/start: the adapter that the first round begins with. RUN/clients: what clients on this machine remember."""


def turns(experiment: Experiment, names: Collection[str]) -> dict[str, list[int]]:
    """The rounds that each client is asked in, if all are there and answer; by name, sorted.

    Args:
        experiment: The experiment.
        names: The clients' names.
    """
    coordinator = Coordinator(names, {}, experiment.federate, seed=experiment.seed)
    found: dict[str, list[int]] = {name: [] for name in sorted(names)}
    for number in range(1, experiment.federate.rounds + 1):
        for name in coordinator.chosen(names, number):
            found[name].append(number)
    return found


def steps_of_all(experiment: Experiment, counts: Mapping[str, int]) -> int:
    """Optimizer steps that all clients take in all rounds: what training on the pooled rows takes.

    Args:
        experiment: The experiment.
        counts: How many rows each client trains on, by name.
    """
    asked = turns(experiment, counts)
    return sum(len(asked[name]) * optimizer_steps(count, experiment.train) for name, count in counts.items())


def read_run(run: Path) -> Experiment:
    """The experiment of a run that was begun.

    Raises:
        ArtifactError, ConfigError: there is none, or it cannot be read.
    """
    return load_experiment(run / "experiment.toml", remote=has_members(run))


def adapter_manifest(source: Manifest, kind: str, layer_map: list[int], experiment: Experiment) -> Manifest:
    """The manifest of an adapter that was tuned in `experiment`.

    Args:
        source: The manifest of the proxy.
        kind: "proxy-adapter" or "llm-adapter".
        layer_map: Blocks of the LLM that the adapter's blocks belong to.
        experiment: The experiment.
    """
    record = experiment.as_dict()
    return Manifest(
        kind=kind,
        llm_sha256=source.llm_sha256,
        llm_blocks=source.llm_blocks,
        layer_map=layer_map,
        settings={
            "train": record["train"],
            "federate": record["federate"],
            "healed": bool(source.settings.get("healed")) and kind == "proxy-adapter",
        },
        seed=experiment.seed,
    )


def begin(experiment: Experiment, directory: RunDirectory, model: AdaptedModel | None = None) -> None:
    """Write RUN/start, the adapter of the first round, unless it is there.

    Args:
        experiment: The experiment.
        directory: The run, its proxy written.
        model: The proxy with its fresh adapter, if it is loaded already.
    """
    place, proxy = directory.path / START, directory.path / "proxy"
    if place.is_dir():
        return
    model = model or load_proxy(experiment, proxy)
    source = Manifest.read(proxy)
    with new_directory(place) as folder:
        manifest = adapter_manifest(source, "proxy-adapter", source.layer_map, experiment)
        write_adapter(folder, model, adapter_state(model), manifest)


def load_proxy(experiment: Experiment, path: Path) -> AdaptedModel:
    """Load a proxy, or the LLM itself, with a fresh adapter, ready for training."""
    return load_trainable(
        path, experiment.train, seed=experiment.seed, trust_remote_code=experiment.llm.trust_remote_code
    )


def tune(
    experiment: Experiment,
    directory: RunDirectory,
    exchange: Callable[[RoundStore], Exchange],
    clients: Collection[str],
    on_closed: Callable[[Closed, float], None] | None = None,
) -> None:
    """Run the rounds that are left and write RUN/adapter, that of the round that is kept.

    Every round is stored before the next begins.

    Args:
        experiment: The experiment.
        directory: The run, driven by this process; RUN/start must be there.
        exchange: Makes the engine's way to the clients; it is given the store of the rounds.
        clients: The clients' names.
        on_closed: Told each complete round and its seconds, once it is stored.

    Raises:
        FederationError: too few clients, or a round without a quorum.
        ArtifactError: what is stored of the run is damaged.
        ResourceError: the disk is full; what was complete stays.
    """
    store = RoundStore(directory.path / "rounds", keep=experiment.federate.keep_rounds)
    last = store.latest()
    _, fresh, manifest = read_adapter(directory.path / START)
    coordinator = Coordinator(
        clients,
        last.adapter if last else fresh,
        experiment.federate,
        seed=experiment.seed,
        conflict=(last.conflict or None) if last else None,
        server_state=last.server_state if last else None,
        state=(last.state or None) if last else None,
        records=store.records(),
        start=fresh,
        ranks=experiment.ranks,
    )

    def closed(outcome: Closed, seconds: float) -> None:
        store.save(outcome, seconds=seconds, best=coordinator.kept)
        directory.event("round_closed", round=outcome.round, seconds=seconds)
        if on_closed is not None:
            on_closed(outcome, seconds)

    drive(coordinator, exchange(store), closed, on_event=directory.event)
    kept = coordinator.kept
    adapter = coordinator.adapter if kept == coordinator.completed else store.adapter(kept)
    directory.event("federated", rounds=coordinator.completed, kept=kept)
    federate = experiment.as_dict()["federate"]  # a resume may have changed what RUN/start was made with
    manifest = replace(manifest, settings={**manifest.settings, "federate": federate, "round": kept})
    with new_directory(directory.path / "adapter") as folder:
        write_adapter(folder, read_json(directory.path / START / CONFIG_FILE), adapter, manifest)
