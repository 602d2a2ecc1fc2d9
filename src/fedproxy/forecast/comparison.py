"""The forecast of a comparison: what each cell costs alone, and what all cost together, shared work counted once."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedproxy.comparison import cells_of, check_methods, tasks_to_compare
from fedproxy.comparison.accounts import Spent, costs, sent_once, spent_by_owner
from fedproxy.comparison.cells import Training, trainings_of
from fedproxy.comparison.work import of_fused, of_proxy, of_training
from fedproxy.config import Compare, Experiment
from fedproxy.federation.client_rows import client_rows
from fedproxy.forecast.known import Known, ProxySize
from fedproxy.forecast.rounds import ClientRound, rounds_of
from fedproxy.forecast.run import OnProgress, tasks_of
from fedproxy.forecast.speed import Speed
from fedproxy.methods import Method, configured, methods_of
from fedproxy.models.encoding import Encoded
from fedproxy.models.validating import Validation
from fedproxy.pipeline import read_experiment

Examples = Mapping[str, Sequence[Encoded]]
Validations = Mapping[str, Validation]
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
    def rows(seed: int) -> tuple[Examples, Validations]:
        report(0.2 + 0.8 * seeds.index(seed) / len(seeds), f"rendering and encoding the rows of seed {seed}")
        drawn, longest = replace(experiment, seed=seed), known.readable(experiment.train.max_length)
        found = client_rows(drawn)
        return found.encoded(known.tokenizer, drawn, longest), found.validations(known.tokenizer, drawn, longest)

    bench, cells, jobs = _Bench(experiment, known, read, rows), list[dict[str, Any]](), Jobs()
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
        scoring = sum(one.scoring_flops for rounds in self.rounds.values() for one in rounds)
        return {self.key: self.aligning + scoring + sum(client.flops for client in self.spent)}

    @property
    def spent(self) -> list[Spent]:
        """What every client would."""
        return [
            Spent(*(sum(getattr(one, what) for one in rounds) for what in ("flops", "bytes_up", "bytes_down")))
            for rounds in self.rounds.values()
        ]


class _Bench:
    """What all cells have in common; as `comparison.cells.Bench`, of which it reckons the costs."""

    def __init__(
        self,
        experiment: Experiment,
        known: Known,
        read: Mapping[str, int],
        rows: Callable[[int], tuple[Examples, Validations]],
    ) -> None:
        self._experiment, self._known, self._read, self._rows = experiment, known, dict(read), rows
        self._proxies: dict[str, _Proxy] = {}

    def cell(self, method: Method, seed: int, remove: float) -> tuple[dict[str, Any], Jobs]:
        """What a cell costs, and the pieces of work it needs."""
        experiment = configured(method, self._experiment, seed=seed, remove=remove)
        if method.result == "llm":
            return costs(seconds={}), self._score("llm", "llm", self._known.proxy(experiment.compress), experiment)
        proxy = self._proxy(experiment)
        if method.data == "none":
            jobs = {**proxy.jobs, **self._score(proxy.key, "proxy", proxy.size, experiment)}
            return self._costs(proxy, []), jobs
        (rows, scored), jobs, trainings = self._rows(seed), dict(proxy.jobs), list[_Trained]()

        def counts() -> dict[str, int]:
            return {name: len(part) for name, part in rows.items()}

        for one in trainings_of(method, experiment, rows, counts, list(self._read)):
            trained = self._train(one, proxy, scored if one.rows is rows else {})
            jobs |= trained.jobs
            for model in (method.result, *["proxy_tuned"] * (not method.whole)):
                key = of_fused(one.experiment, trained.key, Path()) if model == "fused" else trained.key
                jobs |= self._score(key, model, proxy.size, one.experiment, one.tasks)
            trainings.append(trained)
        memory = {device: max(one.memory[device] for one in trainings) for device in ("cpu", "gpu")}
        found = {**self._costs(proxy, trainings), "training_memory": memory}
        if method.data == "each":
            found |= sent_once(rounds[-1].bytes_up for one in trainings for rounds in one.rounds.values())
        if method.rows_travel:
            found |= spent_by_owner(found)
        return found, jobs

    def _costs(self, proxy: _Proxy, trainings: Sequence[_Trained]) -> dict[str, Any]:
        return costs(
            seconds={},
            exposed=proxy.size.share,
            proxy_bytes=proxy.size.bytes,
            served=proxy.healing + sum(one.aligning for one in trainings),
            clients=[client for one in trainings for client in one.spent],
        )

    def _proxy(self, experiment: Experiment) -> _Proxy:
        experiment, key = of_proxy(experiment, Path())
        if key not in self._proxies:
            known, size = self._known, self._known.proxy(experiment.compress)
            healing = known.healing(experiment, size)
            scoring = known.scoring(experiment, size, known.calibration(experiment))
            self._proxies[key] = _Proxy(key, size, healing, {key: scoring + healing})
        return self._proxies[key]

    def _train(self, one: Training[Encoded], proxy: _Proxy, scored: Validations) -> _Trained:
        experiment, key = of_training(one.experiment, one.label, Path())
        aligning, aligned = self._known.aligning(experiment, proxy.size)
        longest = max(len(row.ids) for part in one.rows.values() for row in part)
        return _Trained(
            key,
            rounds_of(experiment, self._known, proxy.size, one.rows, scored, aligned=aligned),
            aligning,
            self._known.training_memory(proxy.size, experiment.train, longest),
        )

    def _score(
        self, of: str, model: str, proxy: ProxySize, experiment: Experiment, tasks: Sequence[str] | None = None
    ) -> Jobs:
        tokens = sum(self._read[task] for task in tasks or self._read)
        return {f"{of} {model}": 2.0 * tokens * self._known.passed(model, proxy, experiment.train)}
