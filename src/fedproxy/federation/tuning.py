"""Stage two: the rounds in which clients tune the proxy, for whatever engine carries them, and their adapter."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedproxy.aggregation.space import space
from fedproxy.artifacts import Manifest, new_directory, read_json
from fedproxy.compression.realign import Realigner, emulator_blocks, last_aligned
from fedproxy.config import Client, Evaluate, Experiment, load_experiment
from fedproxy.data import partition, read_rows
from fedproxy.errors import UsageError
from fedproxy.evaluation import training_rows
from fedproxy.federation.client import answer
from fedproxy.federation.client_state import ClientState
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.inline import InlineExchange
from fedproxy.federation.messages import Closed, Order, Reply
from fedproxy.federation.rounds import Exchange, drive
from fedproxy.federation.store import RoundStore
from fedproxy.federation.tracking import open_tracker
from fedproxy.layer_map import split_name
from fedproxy.models.checkpoints import Tokenizer, load_config, load_tokenizer, padding, resolve
from fedproxy.models.encoding import Encoded, encode
from fedproxy.models.families import readable
from fedproxy.models.lora import (
    CONFIG_FILE,
    AdaptedModel,
    adapter_state,
    read_adapter,
    set_adapter_state,
    train_only,
    without_dropout,
    write_adapter,
)
from fedproxy.models.parallel import team
from fedproxy.models.trainable import load_trainable
from fedproxy.models.training import optimizer_steps
from fedproxy.public_text import read_documents
from fedproxy.run_directory import RunDirectory, has_members
from fedproxy.seeds import derive_seed

_log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
OnProgress = Callable[[str, float, str], None]
"""Told the stage, the fraction of it that is done, and what is being done."""

START, CLIENTS = "start", "clients"
"""RUN/start: the adapter that the first round begins with. RUN/clients: what clients on this machine remember."""
ALIGNMENT, ALIGNED = "alignment", "aligned"
"""RUN/alignment: what aligns the proxy for each round. RUN/aligned: the adapter with that, for the proxy alone."""


def rows_of(client: Client, evaluate: Evaluate, seed: int) -> Rows:
    """The training rows of a client: its file's, or its task's; at most `client.rows`, chosen by the seed.

    Raises:
        ArtifactError: the file or task cannot be read.
        UsageError: the task is unknown.
    """
    if client.task:
        return training_rows(
            client.task, data=evaluate.data or None, include=evaluate.include or None, limit=client.rows, seed=seed
        )
    rows = read_rows(Path(client.data))
    if client.rows is None or client.rows >= len(rows):
        return rows
    order = np.random.default_rng(derive_seed(seed, "rows", client.name)).permutation(len(rows))
    return [rows[i] for i in order[: client.rows]]


def client_rows(experiment: Experiment) -> dict[str, Rows]:
    """The training rows of every client, by name.

    Raises:
        ArtifactError: a data file or task cannot be read.
        UsageError: a task is unknown, or the partition is impossible.
    """
    cut = experiment.partition
    if cut is None:
        return _own_rows(experiment)
    rows = rows_of(Client("partition", cut.data, cut.task, cut.rows), experiment.evaluate, experiment.seed)
    parts = partition(rows, cut.clients, cut.scheme, cut.alpha, experiment.seed)
    return dict(zip(client_names(experiment), parts, strict=True))


def _own_rows(experiment: Experiment) -> dict[str, Rows]:
    """The rows of clients with a file or task each; what several draw of one task are consecutive parts of one draw."""
    evaluate, seed = experiment.evaluate, experiment.seed
    wanted, begin, drawn, found = Counter[str](), Counter[str](), dict[str, Rows](), dict[str, Rows]()
    for client in experiment.client:
        wanted[client.task] += client.rows or 0
    for client in experiment.client:
        if not client.task or client.rows is None:
            found[client.name] = rows_of(client, evaluate, seed)
            continue
        if client.task not in drawn:
            drawn[client.task] = rows_of(replace(client, rows=wanted[client.task]), evaluate, seed)
        rows, first = drawn[client.task], begin[client.task]
        begin[client.task] += client.rows
        found[client.name] = [rows[i % len(rows)] for i in range(first, first + min(client.rows, len(rows)))]
    return found


def client_names(experiment: Experiment) -> list[str]:
    """The names of the clients of an experiment, in its order."""
    cut = experiment.partition
    if cut is None:
        return [client.name for client in experiment.client]
    return [f"client-{number:0{len(str(cut.clients))}d}" for number in range(1, cut.clients + 1)]


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


def encode_clients(
    rows: Mapping[str, Rows], tokenizer: Tokenizer, experiment: Experiment, longest: int
) -> dict[str, list[Encoded]]:
    """Encode every client's rows as [train] says.

    Args:
        rows: The rows by client.
        tokenizer: The LLM's.
        experiment: The experiment.
        longest: Tokens of a row at most.
    """
    only = experiment.train.completion_only_loss
    return {name: encode(part, tokenizer, max_length=longest, completion_only=only) for name, part in rows.items()}


def encode_for(
    model: Path, rows: Mapping[str, Rows], experiment: Experiment
) -> tuple[Tokenizer, dict[str, list[Encoded]]]:
    """The tokenizer of a checkpoint, and every client's rows, encoded as its model is to read them."""
    trust = experiment.llm.trust_remote_code
    tokenizer = load_tokenizer(model, trust_remote_code=trust)
    longest = readable(load_config(model, trust_remote_code=trust), experiment.train.max_length)
    return tokenizer, encode_clients(rows, tokenizer, experiment, longest)


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
    """Run the rounds that are left and write RUN/adapter; every round is stored before the next begins.

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
        control=(last.control or None) if last else None,
        records=last.records if last else (),
        start=fresh,
        ranks=experiment.ranks,
    )

    def closed(outcome: Closed, seconds: float) -> None:
        store.save(outcome, seconds=seconds)
        directory.event("round_closed", round=outcome.round, seconds=seconds)
        if on_closed is not None:
            on_closed(outcome, seconds)

    drive(coordinator, exchange(store), closed, on_event=directory.event)
    with new_directory(directory.path / "adapter") as folder:
        write_adapter(folder, read_json(directory.path / START / CONFIG_FILE), coordinator.adapter, manifest)


def tune_inline(
    experiment: Experiment, directory: RunDirectory, rows: dict[str, Rows], on_progress: OnProgress
) -> None:
    """Run the rounds with all clients one after the other in this process."""
    proxy, settings = directory.path / "proxy", experiment.federate
    tokenizer, examples = encode_for(proxy, rows, experiment)
    _tell_cut(directory, rows, examples)
    aligner = None
    if experiment.heal.realign_steps:
        begin(experiment, directory)
        model, aligner = _aligning(experiment, directory, tokenizer)
    else:
        model = load_proxy(experiment, proxy)
        begin(experiment, directory, model)
    models = {experiment.train.lora_r: model}
    for name in experiment.ranks:
        train = experiment.train_of(name)
        if train.lora_r not in models:
            models[train.lora_r] = load_proxy(replace(experiment, train=train), proxy)
    _, fresh, _ = read_adapter(directory.path / START)
    for model in models.values():
        train_only(model, lambda name: name in fresh and space(settings.space).trains(name))
    place = {name: index for index, name in enumerate(sorted(examples))}

    def reply(order: Order, name: str) -> Reply:
        done = order.round - 1 + place[name] / len(place)

        def on_step(step: int, steps: int, loss: float) -> None:
            on_progress(
                "federate",
                (done + step / steps / len(place)) / settings.rounds,
                f"round {order.round}/{settings.rounds} · {name} · step {step}/{steps} · loss {loss:.3f}",
            )
            tracker.step(name, loss)

        if aligner is not None:
            aligner.before(order.round, {**fresh, **order.adapter})
        train = experiment.train_of(name)
        return answer(
            order,
            name,
            models[train.lora_r],
            examples[name],
            train_settings=train,
            federate_settings=settings,
            pad=padding(tokenizer),
            seed=experiment.seed,
            state=ClientState(directory.path / CLIENTS / name),
            on_step=on_step,
        )

    names = sorted(examples)
    with directory.driven(), open_tracker(experiment, directory.path) as tracker:
        tune(experiment, directory, lambda store: InlineExchange(reply, names), names, tracker.round_closed)


def _tell_cut(directory: RunDirectory, rows: dict[str, Rows], examples: dict[str, list[Encoded]]) -> None:
    """Tell and record how many rows of each client `max_length` cuts; those without a token to learn are left out."""
    left_out = {name: lost for name, part in examples.items() if (lost := len(rows[name]) - len(part))}
    cut = {name: n for name, part in examples.items() if (n := sum(one.cut for one in part))}
    if cut or left_out:
        told = [f"{n} of {len(rows[name])} rows of {name} are cut" for name, n in cut.items()]
        told += [f"{n} of {len(rows[name])} rows of {name} have no token to learn" for name, n in left_out.items()]
        _log.info("[train] max_length: %s.", "; ".join(told))
        directory.event("rows_encoded", cut=cut, left_out=left_out)


def _aligning(experiment: Experiment, directory: RunDirectory, tokenizer: Any) -> tuple[AdaptedModel, Realigner]:
    """The proxy with an adapter on all blocks, RUN/start in those that clients train, and what aligns the others."""
    if team() is not None:
        raise UsageError("[heal] realign_steps needs a single process: run fedproxy without a launcher.")
    proxy = directory.path / "proxy"
    _, fresh, manifest = read_adapter(directory.path / START)
    owned = sorted({split_name(name)[1] for name in fresh})
    emulator = emulator_blocks(len(manifest.layer_map), owned)

    def loaded(path: Path, blocks: Literal["all"] | list[int]) -> AdaptedModel:
        return load_proxy(replace(experiment, train=replace(experiment.train, blocks=blocks)), path)

    model = loaded(proxy, "all")
    without_dropout(model, emulator)
    set_adapter_state(model, {**adapter_state(model), **fresh})
    llm = loaded(resolve(experiment.llm.path), [manifest.layer_map[block] for block in owned])
    documents, _ = read_documents(Path(experiment.heal.text or experiment.compress.calibration))
    aligner = Realigner(
        llm,
        model,
        layer_map=manifest.layer_map,
        owned=owned,
        settings=experiment.heal,
        documents=documents,
        tokenizer=tokenizer,
        seed=experiment.seed,
        folder=directory.path / ALIGNMENT,
    )
    return model, aligner


def write_aligned(directory: RunDirectory) -> None:
    """Write RUN/aligned, RUN/adapter with what aligned the proxy, if anything did and it is not there."""
    extra = last_aligned(directory.path / ALIGNMENT)
    if not extra or (directory.path / ALIGNED).is_dir():
        return
    config, tensors, manifest = read_adapter(directory.path / "adapter")
    config["layers_to_transform"] = list(range(len(manifest.layer_map)))
    with new_directory(directory.path / ALIGNED) as folder:
        write_adapter(folder, config, dict(sorted({**tensors, **extra}.items())), manifest)
