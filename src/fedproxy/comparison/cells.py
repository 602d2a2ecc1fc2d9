"""A cell of the comparison: one method, with one seed, at one share of removed blocks."""

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from fedproxy.artifacts import new_directory, write_json
from fedproxy.comparison.accounts import costs, costs_of_proxy, costs_of_trainings, sent_once, spent_by_owner
from fedproxy.comparison.history import history
from fedproxy.comparison.work import DOCUMENTS, Scored, Work, mean_scored
from fedproxy.config import Experiment, Federate, Train
from fedproxy.evaluation.experiment import scored_tasks
from fedproxy.federation.aligning import proxy_adapter
from fedproxy.federation.client_rows import ClientRows, client_rows, encode_for
from fedproxy.federation.store import RoundStore
from fedproxy.federation.tuning import OnProgress
from fedproxy.federation.turns import steps_of_all, turns
from fedproxy.methods import Method, configured
from fedproxy.models.checkpoints import resolve
from fedproxy.models.training import optimizer_steps
from fedproxy.run_directory import RunDirectory
from fedproxy.tensor_files import save_tensors

POOLED = "pooled"
RECORD = "cell.json"

Key = tuple[str, int, float]
"""Method, seed, share of blocks removed."""
RowsOf = Callable[[int], ClientRows]
"""A seed → each client's rows, which the seed chooses as in any run."""
Row = TypeVar("Row")


def cell_folder(path: Path, key: Key) -> Path:
    """Where the comparison in `path` keeps a cell."""
    name, seed, remove = key
    return path / "cells" / name / f"seed-{seed}-remove-{remove:g}"


def rows_by_seed(experiment: Experiment) -> RowsOf:
    """The clients' rows, read once for each seed."""
    return functools.cache(lambda seed: client_rows(dataclasses.replace(experiment, seed=seed)))


def of_all_seeds(rows: RowsOf, seeds: Iterable[int]) -> dict[str, Any]:
    """The clients' rows of several seeds, each under the name of client and seed."""
    return {f"{name} (seed {seed})": part for seed in seeds for name, part in rows(seed).whole.items()}


def run_cell(
    experiment: Experiment, path: Path, method: Method, key: Key, rows: RowsOf, on_progress: OnProgress
) -> float:
    """Run a cell and write it down.

    Args:
        experiment: The experiment.
        path: The comparison's directory.
        method: Its method.
        key: Which cell.
        rows: Where the clients' rows are looked up.
        on_progress: Told stage, fraction and text of what is being done.

    Returns:
        Seconds.

    Raises:
        As `pipeline.run`.
    """
    began = time.perf_counter()
    _, seed, remove = key
    record, documents = Bench(experiment, Work(path / "work", on_progress), rows).cell(method, seed, remove)
    with new_directory(cell_folder(path, key)) as new:
        save_tensors(new / DOCUMENTS, documents)
        write_json(new / RECORD, record)
    return time.perf_counter() - began


class Bench:
    """What all cells of a comparison have in common.

    Args:
        experiment: The experiment.
        work: The shared work.
        rows: Where the clients' rows are looked up.
    """

    def __init__(self, experiment: Experiment, work: Work, rows: RowsOf) -> None:
        self.experiment, self._work, self._rows = experiment, work, rows
        self.tasks = scored_tasks(experiment)

    def cell(self, method: Method, seed: int, remove: float) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Run one cell.

        Returns:
            What cell.json holds, and the scores of every document by the method's model, by task.

        Raises:
            As `pipeline.run`.
        """
        experiment = configured(method, self.experiment, seed=seed, remove=remove)
        if method.data == "none":
            scored, tuned, costs = self._untuned(method, experiment)
        else:
            scored, tuned, costs = self._tuned(method, experiment)
        return {
            "method": method.name,
            "seed": seed,
            "remove": remove,
            "accuracy": scored.as_dict(),
            "proxy_tuned": tuned and tuned.as_dict(),
            "worst": self._worst(scored),
            "settings": method.settings,
            **costs,
        }, scored.documents

    def _worst(self, scored: Scored) -> dict[str, Any]:
        """The client's task with the lowest score; of all tasks, where clients have none of their own."""
        own = [client.task for client in self.experiment.client if client.task in scored.tasks]
        task = min(own or scored.tasks, key=lambda name: (scored.tasks[name], name))
        return {"task": task, "accuracy": scored.tasks[task]}

    def _untuned(self, method: Method, experiment: Experiment) -> tuple[Scored, None, dict[str, Any]]:
        if method.result == "llm":
            scored = self._work.score(experiment, "llm", self.tasks, experiment.llm.path)
            return scored, None, costs(seconds={"evaluate": scored.seconds})
        proxy = self._work.proxy(experiment)
        scored = self._work.score(experiment, f"{proxy.name}-proxy", self.tasks, proxy)
        return scored, None, costs_of_proxy(experiment.llm, proxy, scored.seconds)

    def _tuned(self, method: Method, experiment: Experiment) -> tuple[Scored, Scored | None, dict[str, Any]]:
        rows, runs, plugged_in = self._rows(experiment.seed), list[RunDirectory](), list[Path]()
        scored, tuned = list[Scored](), list[Scored]()

        def counts() -> dict[str, int]:
            _, encoded = encode_for(resolve(experiment.llm.path), rows, experiment)
            return {name: len(examples) for name, examples in encoded.items()}

        for one in trainings_of(method, experiment, rows, counts, self.tasks):
            own = rows if one.rows is rows else ClientRows({name: list(part) for name, part in one.rows.items()})
            runs.append(self._work.training(one.experiment, own, one.label))
            fused = self._work.fused(one.experiment, runs[-1]) if method.result == "fused" else None
            judged, proxy = self._scores(method, one.experiment, runs[-1], fused, one.tasks)
            scored.append(judged)
            plugged_in += [fused] if fused is not None else []
            tuned += [proxy] if proxy is not None else []
        seconds = sum(one.seconds for one in [*scored, *tuned])
        spent = costs_of_trainings(experiment.llm, runs, plugged_in, seconds)
        if method.data == "each":
            last = [RoundStore(run.path / "rounds").records()[-1] for run in runs]
            spent |= sent_once(client["bytes_up"] for record in last for client in record["clients"].values())
        if method.rows_travel:
            spent |= spent_by_owner(spent)
        if method.data == "clients":
            spent |= history(runs[0])
        return mean_scored(scored), mean_scored(tuned) if tuned else None, spent

    def _scores(
        self, method: Method, experiment: Experiment, run: RunDirectory, fused: Path | None, tasks: list[str]
    ) -> tuple[Scored, Scored | None]:
        """Of the method's model, and of the tuned proxy, unless that is the LLM itself."""
        path, llm, name = run.path, experiment.llm.path, run.path.name
        if fused is None:
            files = path / "adapter", path / "proxy"
            scored = self._work.score(experiment, f"{name}-proxy-tuning", tasks, llm, *files)
        else:
            scored = self._work.score(experiment, f"{fused.name}-fused", tasks, llm, fused)
        if method.whole:
            return scored, None
        proxy = path / "proxy"
        return scored, self._work.score(experiment, f"{name}-proxy-tuned", tasks, proxy, proxy_adapter(path))


@dataclass(frozen=True)
class Training(Generic[Row]):
    """A training that a method needs.

    Attributes:
        experiment: What it goes by.
        rows: The rows of those who take part, by name, as they were given.
        label: What is done with the clients' data.
        tasks: What the tuned models are scored on.
    """

    experiment: Experiment
    rows: Mapping[str, Sequence[Row]]
    label: str
    tasks: list[str]


def trainings_of(
    method: Method,
    experiment: Experiment,
    rows: Mapping[str, Sequence[Row]],
    counts: Callable[[], Mapping[str, int]],
    tasks: Sequence[str],
) -> list[Training[Row]]:
    """The trainings of a method: a federation, one of a party with the pooled rows, or one of each client alone.

    Args:
        method: The method.
        experiment: The experiment as the method has it.
        rows: Each client's rows.
        counts: Says how many of them each client trains on.
        tasks: What models are scored on; a client alone is scored on its own of them, where it has one.
    """
    match method.data:
        case "each":
            own = {client.name: [client.task] for client in experiment.client if client.task in tasks}
            return [
                Training(
                    _of_one(experiment, experiment.train_of(name), rounds),
                    {name: rows[name]},
                    f"alone: {name}",
                    own.get(name, list(tasks)),
                )
                for name, rounds in rounds_alone(experiment, rows).items()
            ]
        case "pooled":
            name = next(iter(rows)) if len(rows) == 1 else POOLED
            pool = [row for part in sorted(rows) for row in rows[part]]
            return [Training(pooled_experiment(experiment, counts()), {name: pool}, POOLED, list(tasks))]
    return [Training(experiment, rows, "clients", list(tasks))]


def pooled_experiment(experiment: Experiment, counts: Mapping[str, int]) -> Experiment:
    """The experiment of one client with all rows, that takes in one round as many steps as all clients took in all.

    Args:
        experiment: The experiment of all clients.
        counts: How many rows each of them trains on, by name.
    """
    train, steps = experiment.train, steps_of_all(experiment, counts)
    a_epoch = optimizer_steps(sum(counts.values()), dataclasses.replace(train, epochs=1.0, max_steps=None))
    return _of_one(experiment, dataclasses.replace(train, epochs=steps / a_epoch + 1.0, max_steps=steps), 1)


def rounds_alone(experiment: Experiment, names: Collection[str]) -> dict[str, int]:
    """How many rounds each client trains in alone: as many as the federation asks it in, and one at least.

    Args:
        experiment: The experiment of all clients.
        names: The clients, in whose order the answer is.
    """
    asked = turns(experiment, names)
    return {name: max(1, len(asked[name])) for name in names}


def _of_one(experiment: Experiment, train: Train, rounds: int) -> Experiment:
    """The experiment of a single party: what trains is A and B, and nothing is encoded, merged, limited or awaited."""
    client = tuple(dataclasses.replace(client, lora_r=None) for client in experiment.client)
    federate = Federate(rounds, "mean", regulariser="none", quorum=1.0, keep_rounds=experiment.federate.keep_rounds)
    return dataclasses.replace(experiment, client=client, train=train, federate=federate)
