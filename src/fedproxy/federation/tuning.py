"""Stage two: the rounds in which clients tune the proxy, for whatever engine carries them, and their adapter."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from fedproxy.adapter_files import read_adapter, write_adapter
from fedproxy.artifacts import new_directory
from fedproxy.config import Experiment, load_experiment
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.messages import Closed
from fedproxy.federation.rounds import Exchange, drive
from fedproxy.federation.store import RoundStore
from fedproxy.run_directory import RunDirectory, has_members

OnProgress = Callable[[str, float, str], None]
"""Told the stage, the fraction of it that is done, and what is being done."""

START, CLIENTS = "start", "clients"
"""RUN/start: the adapter that the first round begins with. RUN/clients: what clients on this machine remember."""


def read_run(run: Path) -> Experiment:
    """The experiment of a run that was begun.

    Raises:
        ArtifactError, ConfigError: there is none, or it cannot be read.
    """
    return load_experiment(run / "experiment.toml", remote=has_members(run))


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
    config, fresh, manifest = read_adapter(directory.path / START)
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
        write_adapter(folder, config, adapter, manifest)
