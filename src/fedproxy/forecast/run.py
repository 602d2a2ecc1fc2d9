"""The forecast of one run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fedproxy.aggregation.space import SPACES, trained
from fedproxy.config import Compress, Experiment
from fedproxy.evaluation.experiment import scored_tasks
from fedproxy.evaluation.reading import Reading, reading_of
from fedproxy.federation.client_rows import client_rows
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.fitting import check_fit, private_plans
from fedproxy.federation.turns import steps_of_all
from fedproxy.forecast.known import FLOAT, Known, ProxySize, Shapes, count
from fedproxy.forecast.rounds import ClientRound, rounds_of, trained_shapes
from fedproxy.forecast.speed import Speed
from fedproxy.forecast.texts import texts_of
from fedproxy.models.costs import training
from fedproxy.models.encoding import Encoded
from fedproxy.models.placement import ROOM
from fedproxy.models.text_batches import Batch
from fedproxy.models.training import trained_tokens
from fedproxy.pipeline import read_experiment
from fedproxy.privacy.client_noise import ClientNoise
from fedproxy.privacy.plan import norm_of_noise
from fedproxy.seeds import derive_seed
from fedproxy.tensors import outline, outlines, parameter_count

FEW = 0.2
"""Steps × learning rate × α/r: about how far Adam can move LoRA's update, and how much of that a proxy takes that lacks
all of its blocks; one that lacks half takes half. SmolLM2 without half of its blocks closes 0.15 of the gap at 0.08;
without a quarter 0.09 moves four tasks from 60 % right to 88 % (experiments/smollm2)."""
LOUD = 1.0
"""Noise of a step in norms of the clipped gradients' mean, which has 1 at most. From 3 on no experiment kept more than
three tenths of what tuning gains, from 0.6 to 3 a fifth to two thirds stayed (docs/privacy_budget.md)."""
_SUMMED = ("steps", "tokens", "flops", "scoring_flops", "bytes_up", "bytes_down")
OnProgress = Callable[[float, str], None]


def forecast_run(
    experiment: Experiment | str | Path, speed: Speed, *, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Tell what `fedproxy run` would do; nothing is written.

    Args:
        experiment: An experiment file, or one loaded.
        speed: What operations are divided by.
        on_progress: Told the fraction done and what is being done.

    Returns:
        "clients": by name, its `Texts`, the "memory" of training as bytes on a CPU in float32 and on a GPU in bfloat16,
        beside the program itself, as "scored" the rows that it keeps back, and its "rounds", each a `ClientRound`, with
        their sums; "privacy": by client, what [train.privacy] makes of it (`Plan.as_dict`); "client_privacy": what
        [federate.privacy] does; "warnings": what to think over before the run, in sentences; "tasks": documents and
        tokens that scoring reads; "memory": bytes on a CPU and on a GPU, by party and stage; "flops" and "seconds" by
        stage; "bytes" of all clients and rounds, and of the proxy that each gets once.

    Raises:
        ConfigError, UsageError: the experiment cannot be used.
        ArtifactError: the LLM, a client's data, a task or a text cannot be used.
    """
    report = on_progress or (lambda fraction, text: None)
    experiment = read_experiment(experiment)
    report(0.0, "looking at the LLM")
    known = Known(experiment)
    check_fit(experiment, known.shape.decoder)
    proxy, text = known.proxy(experiment.compress), known.calibration(experiment)
    aligning, aligned = known.aligning(experiment, proxy)
    report(0.1, "rendering the clients' rows")
    rows = client_rows(experiment)
    report(0.5, "encoding the clients' rows")
    longest = known.readable(experiment.train.max_length)
    examples = rows.encoded(known.tokenizer, experiment, longest)
    scored = rows.validations(known.tokenizer, experiment, longest)
    privacy = {
        name: plan.as_dict(count(trained_shapes(experiment, name, known, proxy)))
        for name, plan in private_plans(experiment, {name: len(part) for name, part in examples.items()}).items()
    }
    rounds = rounds_of(experiment, known, proxy, examples, scored, aligned=aligned)
    clients = {
        name: {
            **_client(experiment, known, proxy, rows[name], examples[name], rounds[name], name),
            "scored": scored[name].rows if name in scored else 0,
        }
        for name in rows
    }
    report(0.7, "rendering the tasks")
    tasks = tasks_of(experiment, known)
    models = [*experiment.evaluate.models, *["centralized"] * experiment.evaluate.centralized]
    read = sum(one.tokens for one in tasks.values())
    held = sum(one.tokens for one in scored.values())
    slowest = [
        max(
            (one.flops + one.scoring_flops for asked in rounds.values() for one in asked if one.round == number),
            default=0.0,
        )
        for number in range(1, experiment.federate.rounds + 1)
    ]
    flops = {
        "compress": known.scoring(experiment, proxy, text) + known.healing(experiment, proxy),
        "align": aligning,
        "clients": sum(client["flops"] for client in clients.values()),
        "scoring": sum(client["scoring_flops"] for client in clients.values()),
        "slowest_clients": sum(slowest),
        "centralized": _centralized(experiment, known, examples) if experiment.evaluate.centralized else 0.0,
        "evaluate": sum(2.0 * read * known.passed(model, proxy, experiment.train) for model in models)
        + sum(2.0 * held * known.passed(model, proxy, experiment.train) for model in ("llm", "fused")),
    }
    report(1.0, "forecast")
    return {
        "name": experiment.name,
        "llm": known.as_dict(),
        "proxy": proxy.as_dict(),
        "rounds": experiment.federate.rounds,
        "clients": clients,
        "privacy": privacy,
        "client_privacy": client_privacy_of(experiment, count(known.adapter(proxy, experiment.train))),
        "warnings": few_steps(
            experiment,
            1 - len(proxy.keep) / known.shape.count,
            {name: client["steps"] for name, client in clients.items()},
        )
        + loud_noise({name: plan["norms"] for name, plan in privacy.items()}),
        "tasks": {name: asdict(one) for name, one in tasks.items()},
        "models": models,
        "memory": {
            "server": server_memory(experiment, known, proxy, text),
            "client": {
                device: max(client["memory"][device] for client in clients.values()) for device in ("cpu", "gpu")
            },
        },
        "bytes": {
            "proxy": proxy.bytes,
            "up": sum(client["bytes_up"] for client in clients.values()),
            "down": sum(client["bytes_down"] for client in clients.values()),
        },
        "flops": flops,
        "speed": asdict(speed),
        "seconds": {stage: count / speed.flops for stage, count in flops.items()},
    }


def client_privacy_of(experiment: Experiment, parameters: int) -> dict[str, float] | None:
    """What [federate.privacy] makes of an adapter of so many trained values; none without.

    Returns:
        "noise", the noise z of a sum in norms of `clip`; "epsilon" of all rounds; "norms", the expected norm of the
        noise in the mean of a full round's updates, in norms of `clip`.
    """
    noise = ClientNoise.of(experiment.federate)
    if noise is None:
        return None
    clients = Coordinator(experiment.client_names, {}, experiment.federate).target
    rounds = experiment.federate.rounds
    norms = norm_of_noise(noise.multiplier, parameters, clients)
    return {"noise": noise.multiplier, "epsilon": noise.spent(rounds), "norms": norms}


def few_steps(experiment: Experiment, lacks: float, steps: Mapping[str, int]) -> list[str]:
    """Warn where clients take few steps for what the proxy lacks; healing makes up for none (experiments/smollm2).

    Args:
        experiment: The experiment.
        lacks: Share of the LLM's blocks that the proxy lacks.
        steps: Steps of each client in all rounds.

    Returns:
        One sentence, or none.
    """
    train = {name: experiment.train_of(name) for name in steps}
    reach = {
        name: count * train[name].learning_rate * train[name].lora_alpha / train[name].lora_r
        for name, count in steps.items()
        if count  # who is never asked takes none, however many there are
    }
    few = [name for name, value in reach.items() if value < FEW * lacks]
    if not few:
        return []
    name = min(few, key=lambda one: reach[one])
    return [
        f"{len(few)} of {len(steps)} clients take few steps for a proxy that lacks {lacks:.0%} of the blocks: {name} "
        f"takes {steps[name]} at the learning rate {train[name].learning_rate:g}, and {FEW * lacks / reach[name]:.1f} "
        "times as many are advised. Give smaller batches, more rounds, rows or epochs, or a higher learning rate."
    ]


def loud_noise(norms: Mapping[str, float]) -> list[str]:
    """Warn where the noise of differential privacy is longer than the gradients that it covers.

    Args:
        norms: `Plan.norms` by client.

    Returns:
        One sentence, or none.
    """
    loud = [name for name, value in norms.items() if value > LOUD]
    if not loud:
        return []
    name = max(loud, key=lambda one: norms[one])
    return [
        f"Differential privacy may cost {len(loud)} of {len(norms)} clients most of what they learn: in each step of "
        f"{name} the noise is {norms[name]:.3g} times as long as its rows' mean gradient may be. Larger batches of "
        "more rows make it shorter, and so do fewer trained values ([train] lora_r, lora_targets) or a larger epsilon."
    ]


def tasks_of(experiment: Experiment, known: Known) -> dict[str, Reading]:
    """What scoring a model reads, by task.

    Raises:
        UsageError, ArtifactError: a task cannot be used.
    """
    settings, names = experiment.evaluate, scored_tasks(experiment)
    if not names:
        return {}
    return reading_of(
        names,
        known.tokenizer,
        data=settings.data,
        include=settings.include,
        limit=settings.limit,
        trust_tasks=settings.trust_tasks,
    )


def server_memory(
    experiment: Experiment, known: Known, proxy: ProxySize, text: Sequence[Batch]
) -> dict[str, dict[str, int]]:
    """Bytes that the server's stages take on a CPU and on a GPU, beside the program itself.

    "merge" holds the round's updates, the adapter before and after and its conflict; what is merged, and in a byte
    each how far the clients disagree on it. In the space of the products that is as long as the layers' weights.
    "evaluate" holds the LLM, in float32 on a CPU, and room for running it. With [evaluate] centralized the server
    trains the LLM as well.
    """
    compressing = {name: known.compressing_memory(text, torch.device(name)) for name in ("cpu", "cuda")}
    updates = Coordinator(experiment.client_names, {}, experiment.federate).target
    shapes = known.adapter(proxy, experiment.train)
    merging = FLOAT * (updates + 3) * count(shapes) + (FLOAT + 1) * _merged(experiment, shapes)
    found = {
        **{
            f"compress, {how}": {"cpu": compressing["cpu"][key], "gpu": compressing["cuda"][key]}
            for how, key in (("in memory", "memory"), ("block by block", "stream"))
        },
        "merge": {"cpu": merging, "gpu": merging},
        "evaluate": {"cpu": int(ROOM * FLOAT * known.shape.parameters), "gpu": int(ROOM * known.shape.bytes)},
    }
    if experiment.evaluate.centralized:
        whole = known.proxy(Compress(remove=0.0))
        found["centralized"] = known.training_memory(
            whole, experiment.train, known.readable(experiment.train.max_length)
        )
    return found


def _merged(experiment: Experiment, shapes: Shapes) -> int:
    """Coordinates of what the server merges."""
    adapter = {name: outline(shape, torch.float32, torch.device("meta")) for name, shape in shapes.items()}
    space = SPACES.choose(experiment.federate.space)
    return parameter_count(outlines(space.vector(adapter, trained(space, adapter))))


def _client(
    experiment: Experiment,
    known: Known,
    proxy: ProxySize,
    rows: Sequence[Mapping[str, Any]],
    examples: Sequence[Encoded],
    rounds: list[ClientRound],
    name: str,
) -> dict[str, Any]:
    train = experiment.train_of(name)
    train = replace(train, max_length=known.readable(train.max_length))
    texts = texts_of(rows, known.tokenizer, train, examples)
    memory = known.training_memory(proxy, train, texts.longest)
    sums = {what: sum(getattr(one, what) for one in rounds) for what in _SUMMED}
    return {**asdict(texts), "memory": memory, "rounds": [asdict(one) for one in rounds], **sums}


def _centralized(experiment: Experiment, known: Known, examples: Mapping[str, Sequence[Encoded]]) -> float:
    """Operations of tuning the LLM itself on all rows, with the steps of all clients."""
    whole, settings = known.proxy(Compress(remove=0.0)), replace(experiment.train, blocks="all")
    steps = steps_of_all(experiment, {name: len(part) for name, part in examples.items()})
    pooled = [example for name in sorted(examples) for example in examples[name]]
    tokens = trained_tokens(pooled, settings, derive_seed(experiment.seed, "centralized"), steps)
    trains = count(known.adapter(whole, settings))
    return training(tokens, whole.matrices, trained=whole.trained(settings), parameters=trains)
