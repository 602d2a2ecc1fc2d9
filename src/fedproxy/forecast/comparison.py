"""The forecast of a comparison: what each cell costs alone, and what all cost together, shared work counted once."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedproxy.comparison import cells_of, check_methods, tasks_to_compare
from fedproxy.comparison.accounts import costs
from fedproxy.comparison.cells import POOLED, lone_experiment, pooled_experiment, rounds_alone
from fedproxy.comparison.work import digest
from fedproxy.config import Compare, Experiment
from fedproxy.federation.client_rows import client_rows
from fedproxy.forecast.known import Known, ProxySize
from fedproxy.forecast.rounds import ClientRound, rounds_of
from fedproxy.forecast.run import OnProgress, tasks_of
from fedproxy.forecast.speed import Speed
from fedproxy.methods import Method, configured, methods_of
from fedproxy.models.encoding import Encoded
from fedproxy.pipeline import read_experiment

Examples = Mapping[str, Sequence[Encoded]]
Jobs = dict[str, float]
"""What is made once however many cells need it → its operations."""


def forecast_comparison(
    experiment: Experiment | str | Path, speed: Speed, *, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Tell what `fedproxy compare` would do; nothing is written.

    Args:
        experiment: An experiment file, or one loaded.
        speed: What operations are divided by.
        on_progress: Told the fraction done and what is being done.

    Returns:
        "cells": for each what cell.json says of its costs, as far as it can be known, with its operations ("flops": by
        party as there, and "all" with scoring), the bytes that training takes on a CPU and on a GPU
        ("training_memory"), and its seconds if it were alone; "all": what all cells take together, with
        "cells" and "jobs", their number and that of the pieces of work they share.

    Raises:
        ConfigError, UsageError: the experiment cannot be used, or a method does not fit it.
        ArtifactError: the LLM, a client's data, a task or a text cannot be used.
    """
    report = on_progress or (lambda fraction, text: None)
    experiment = read_experiment(experiment)
    tasks_to_compare(experiment)
    keys, methods = cells_of(experiment), methods_of(experiment.compare or Compare())
    experiment = replace(experiment, compare=None)
    report(0.0, "looking at the LLM")
    known = Known(experiment)
    check_methods(experiment, methods, keys, known.shape.decoder)
    report(0.1, "rendering the tasks")
    read = {name: one.tokens for name, one in tasks_of(experiment, known).items()}
    seeds = list(dict.fromkeys(seed for _, seed, _ in keys))

    @functools.cache
    def examples(seed: int) -> Examples:
        report(0.2 + 0.8 * seeds.index(seed) / len(seeds), f"rendering and encoding the rows of seed {seed}")
        drawn = replace(experiment, seed=seed)
        return client_rows(drawn).encoded(known.tokenizer, drawn, known.readable(drawn.train.max_length))

    bench, cells, jobs = _Bench(experiment, known, read, examples), list[dict[str, Any]](), Jobs()
    for name, seed, remove in sorted(keys, key=lambda key: seeds.index(key[1])):
        found, own = bench.cell(methods[name], seed, remove)
        found = {"training_memory": None, **found}
        found["flops"]["all"] = sum(own.values())
        del found["peak_memory_bytes"]  # which is measured
        found["seconds"] = sum(own.values()) / speed.flops
        cells.append({"method": name, "seed": seed, "remove": remove, **found})
        jobs |= own
    report(1.0, "forecast")
    total = sum(jobs.values())
    return {
        "name": experiment.name,
        "llm": known.as_dict(),
        "cells": cells,
        "all": {"cells": len(cells), "jobs": len(jobs), "flops": total, "seconds": total / speed.flops},
        "speed": asdict(speed),
    }


@dataclass(frozen=True)
class _Proxy:
    key: str
    size: ProxySize
    healing: float
    jobs: Jobs


@dataclass(frozen=True)
class _Trained:
    """A training: what it is known by, every client's rounds, what aligning the proxy takes, and its memory."""

    key: str
    rounds: dict[str, list[ClientRound]]
    aligning: float
    memory: dict[str, int]

    @property
    def jobs(self) -> Jobs:
        return {self.key: self.aligning + sum(self.spent("flops"))}

    def spent(self, what: str) -> list[Any]:
        """Of every client, the sum over its rounds."""
        return [sum(getattr(one, what) for one in rounds) for rounds in self.rounds.values()]


class _Bench:
    """What all cells have in common; as `comparison.cells.Bench`, of which it reckons the costs."""

    def __init__(
        self, experiment: Experiment, known: Known, read: Mapping[str, int], examples: Callable[[int], Examples]
    ) -> None:
        self._experiment, self._known, self._read, self._examples = experiment, known, dict(read), examples
        self._proxies: dict[str, _Proxy] = {}

    def cell(self, method: Method, seed: int, remove: float) -> tuple[dict[str, Any], Jobs]:
        """What a cell costs, and the pieces of work it needs."""
        experiment = configured(method, self._experiment, seed=seed, remove=remove)
        if method.result == "llm":
            return costs(seconds={}), self._score("llm", "llm", None, experiment)
        proxy = self._proxy(experiment)
        if method.data == "none":
            served = {"server": proxy.healing, "clients": 0.0, "client_most": 0.0}
            found = costs(seconds={}, exposed=proxy.size.share, proxy_bytes=proxy.size.bytes, flops=served)
            return found, {**proxy.jobs, **self._score(proxy.key, "proxy", proxy.size, experiment)}
        rows = self._examples(seed)
        if method.data == "each":
            return self._alone(method, experiment, proxy, rows)
        label = "clients"
        if method.data == "pooled":
            experiment = pooled_experiment(experiment, {name: len(part) for name, part in rows.items()})
            name = next(iter(rows)) if len(rows) == 1 else POOLED
            rows, label = {name: [one for part in sorted(rows) for one in rows[part]]}, POOLED
        trained = self._train(experiment, proxy, rows, label)
        found = self._costs(proxy, [trained])
        if method.whole and method.data == "pooled":  # the rows travel, not the model
            flops = {"server": found["flops"]["clients"], "clients": 0.0, "client_most": 0.0}
            found = costs(seconds={}, flops=flops) | {"training_memory": trained.memory}
        return found, {**proxy.jobs, **trained.jobs, **self._scores(method, experiment, proxy, trained)}

    def _alone(
        self, method: Method, experiment: Experiment, proxy: _Proxy, rows: Examples
    ) -> tuple[dict[str, Any], Jobs]:
        own = {client.name: client.task for client in experiment.client if client.task in self._read}
        jobs, trainings = dict(proxy.jobs), []
        for name, rounds in rounds_alone(experiment, rows).items():
            alone = lone_experiment(experiment, name, rounds)
            trained = self._train(alone, proxy, {name: rows[name]}, f"alone: {name}")
            tasks = [own[name]] if name in own else None
            jobs |= {**trained.jobs, **self._scores(method, alone, proxy, trained, tasks)}
            trainings.append(trained)
        found = self._costs(proxy, trainings)
        found["bytes_up"] = sum(rounds[-1].bytes_up for one in trainings for rounds in one.rounds.values())
        found["bytes_down"] = 0  # nothing but the proxy comes, nothing but the last adapter goes
        return found, jobs

    def _costs(self, proxy: _Proxy, trainings: Sequence[_Trained]) -> dict[str, Any]:
        spent = {
            what: [n for one in trainings for n in one.spent(what)] for what in ("flops", "bytes_up", "bytes_down")
        }
        return costs(
            seconds={},
            exposed=proxy.size.share,
            proxy_bytes=proxy.size.bytes,
            bytes_up=sum(spent["bytes_up"]),
            bytes_down=sum(spent["bytes_down"]),
            flops={
                "server": proxy.healing + sum(one.aligning for one in trainings),
                "clients": sum(spent["flops"]),
                "client_most": max(spent["flops"]),
            },
        ) | {"training_memory": {device: max(one.memory[device] for one in trainings) for device in ("cpu", "gpu")}}

    def _proxy(self, experiment: Experiment) -> _Proxy:
        whole = experiment.compress.remove == 0 and experiment.heal.steps == 0
        seed, heal = 0 if whole else experiment.seed, replace(experiment.heal, realign_steps=0)
        experiment = replace(experiment, seed=seed, heal=heal)
        key = _key("proxy", experiment, "compress", "heal", "seed")
        if key not in self._proxies:
            self._proxies[key] = self._made(key, experiment)
        return self._proxies[key]

    def _made(self, key: str, experiment: Experiment) -> _Proxy:
        known, size = self._known, self._known.proxy(experiment.compress)
        healing = known.healing(experiment, size)
        scoring = known.scoring(experiment, size, known.calibration(experiment))
        return _Proxy(key, size, healing, {key: scoring + healing})

    def _train(self, experiment: Experiment, proxy: _Proxy, rows: Examples, label: str) -> _Trained:
        aligning, aligned = self._known.aligning(experiment, proxy.size)
        parts = ("compress", "heal", "train", "federate", "fuse", "seed")
        return _Trained(
            _key(label, experiment, *parts),
            rounds_of(experiment, self._known, proxy.size, rows, aligned=aligned),
            aligning,
            self._known.training_memory(
                proxy.size, experiment.train, max(len(one.ids) for part in rows.values() for one in part)
            ),
        )

    def _scores(
        self,
        method: Method,
        experiment: Experiment,
        proxy: _Proxy,
        trained: _Trained,
        tasks: Sequence[str] | None = None,
    ) -> Jobs:
        """Of the method's model, and of the tuned proxy, unless that is the LLM itself."""
        models = [method.result, *["proxy_tuned"] * (not method.whole)]
        return {
            name: flops
            for model in models
            for name, flops in self._score(trained.key, model, proxy.size, experiment, tasks).items()
        }

    def _score(
        self,
        of: str,
        model: str,
        proxy: ProxySize | None,
        experiment: Experiment,
        tasks: Sequence[str] | None = None,
    ) -> Jobs:
        proxy = proxy or self._known.proxy(experiment.compress)
        tokens = sum(self._read[task] for task in tasks or self._read)
        return {f"{of} {model}": 2.0 * tokens * self._known.passed(model, proxy, experiment.train)}


def _key(label: str, experiment: Experiment, *parts: str) -> str:
    values = experiment.as_dict()
    return f"{label} {digest({part: values[part] for part in parts})}"
