"""The work that cells of a comparison share: each proxy, training and score is made once, and found again by its key.

    DIR/work/proxies/KEY/      a proxy; KEY.json beside it holds what making it cost
    DIR/work/trainings/KEY/    a run directory: rounds, adapter; its proxy is a link
    DIR/work/fused/KEY/        a training's adapter for the LLM; KEY.json beside it holds what making it cost
    DIR/work/scores/NAME/      a model's scores, and those of every document

    DIR/work/locks/            what one process makes, others wait for

All survive a kill: a proxy and a score appear complete or not at all, a training goes on from its last round.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedproxy.artifacts import locked, new_directory, os_error, read_json, write_json
from fedproxy.config import Experiment, Fuse, from_folder
from fedproxy.errors import UsageError
from fedproxy.evaluation.experiment import score
from fedproxy.federation.aligning import write_aligned
from fedproxy.federation.client_rows import ClientRows
from fedproxy.federation.inline import tune_inline
from fedproxy.federation.tuning import OnProgress
from fedproxy.fusion.run import fuse_run
from fedproxy.memory import peak_memory, restart_peak
from fedproxy.metrics import main_metric
from fedproxy.pipeline import make_proxy
from fedproxy.run_directory import RunDirectory, owned
from fedproxy.tensor_files import load_tensors, save_tensors

SCORES, DOCUMENTS = "scores.json", "documents.safetensors"


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Measure seconds and the peak memory of the process (or of the GPU's) within the block."""
    found: dict[str, float] = {}
    cuda = torch.cuda.is_available()
    torch.cuda.reset_peak_memory_stats() if cuda else restart_peak()
    began = time.perf_counter()
    yield found
    found["seconds"] = time.perf_counter() - began
    found["peak_memory_bytes"] = torch.cuda.max_memory_allocated() if cuda else peak_memory()


@dataclass(frozen=True)
class Scored:
    """What a model scored.

    Attributes:
        tasks: Task → main metric, of the tasks that methods are compared by.
        left_out: Task → why it is not among them.
        documents: Task → main metric of every document, float32; only tasks whose metric is a mean over documents.
        seconds: What it took.
    """

    tasks: dict[str, float]
    left_out: dict[str, str]
    documents: dict[str, torch.Tensor]
    seconds: float

    @property
    def average(self) -> float:
        """Mean over the tasks."""
        return sum(self.tasks.values()) / len(self.tasks)

    def as_dict(self) -> dict[str, Any]:
        """The accuracies, without the documents.

        Raises:
            UsageError: every task is left out.
        """
        if not self.tasks:
            why = "; ".join(f"{task}: {reason}" for task, reason in self.left_out.items())
            raise UsageError(
                f"There is nothing to compare by ({why}). Give [evaluate] a task with an accuracy as well."
            )
        scores = {"tasks": self.tasks, "average": self.average}
        return scores | ({"left_out": self.left_out} if self.left_out else {})


def mean_scored(parts: Sequence[Scored]) -> Scored:
    """The mean of several models' scores: of each task over those models that were scored on it."""

    def mean(values: Sequence[Any]) -> Any:
        return sum(values) / len(values)

    names = dict.fromkeys(task for part in parts for task in part.tasks)
    documents = {task: [part.documents[task] for part in parts if task in part.documents] for task in names}
    return Scored(
        {task: mean([part.tasks[task] for part in parts if task in part.tasks]) for task in names},
        {task: why for part in parts for task, why in part.left_out.items()},
        {task: mean(found) for task, found in documents.items() if found},
        sum(part.seconds for part in parts),
    )


class Work:
    """Makes what cells need, unless it is there.

    Args:
        folder: DIR/work.
        on_progress: Told the stage, its fraction and what is being done.
    """

    def __init__(self, folder: Path, on_progress: OnProgress) -> None:
        self._folder, self._progress = folder, on_progress

    def proxy(self, experiment: Experiment) -> Path:
        """The proxy of an experiment."""
        experiment, key = of_proxy(experiment, self._folder)
        path = self._folder / "proxies" / key
        with self._alone(path):
            if not path.is_dir():
                with measured() as cost:
                    make_proxy(experiment, path, self._progress)
                write_json(cost_file(path), cost)
        self._progress("compress", 1.0, "proxy written")
        return path

    def training(self, experiment: Experiment, rows: ClientRows, label: str) -> RunDirectory:
        """Tune the proxy of an experiment.

        Args:
            experiment: The experiment as the method has it.
            rows: The clients' rows.
            label: What is done with the clients' data: the name that the run bears.
        """
        experiment, key = of_training(experiment, label, self._folder)
        proxy, path = self.proxy(experiment), self._folder / "trainings" / key
        with self._alone(path), owned(path, experiment, resume=True, overwrite=False) as directory:
            if not (path / "proxy").is_dir():
                try:
                    (path / "proxy").symlink_to(Path("..", "..", "proxies", proxy.name), target_is_directory=True)
                except OSError as error:
                    raise os_error(error, path / "proxy") from error
            directory.check_same_rows(rows.whole)
            if not (path / "adapter").is_dir():
                with directory.stage("federate"):
                    tune_inline(experiment, directory, rows, self._progress)
            write_aligned(directory)
            return directory

    def fused(self, experiment: Experiment, run: RunDirectory) -> Path:
        """What a training learned, plugged into the LLM as [fuse] of the experiment says."""
        path = self._folder / "fused" / of_fused(experiment, run.path.name, self._folder)
        with self._alone(path):
            if not path.is_dir():
                with measured() as cost:
                    fuse_run(experiment, run.path, self._progress, path)
                write_json(cost_file(path), cost)
        return path

    def score(
        self,
        experiment: Experiment,
        name: str,
        tasks: Sequence[str],
        model: str | Path,
        adapter: Path | None = None,
        proxy: Path | None = None,
    ) -> Scored:
        """Score a model.

        Args:
            experiment: The experiment, for its [evaluate] table.
            name: What the score is kept under.
            tasks: Tasks to score it on.
            model: Checkpoint.
            adapter: Adapter to put on it, or on the proxy.
            proxy: The proxy, for decode-time proxy tuning.
        """
        path = self._folder / "scores" / name
        with self._alone(path):
            if not path.is_dir():
                documents = dict[str, torch.Tensor]()

                def on_documents(task: str, scores: list[float]) -> None:
                    documents[task] = torch.tensor(scores, dtype=torch.float32)

                with measured() as cost:
                    found = score(
                        experiment,
                        tasks,
                        model,
                        adapter,
                        proxy=proxy,
                        on_progress=lambda fraction, text: self._progress("evaluate", fraction, text),
                        on_documents=on_documents,
                    )
                with new_directory(path) as folder:
                    write_json(folder / SCORES, {**found, **cost})
                    save_tensors(folder / DOCUMENTS, documents)
        record = read_json(path / SCORES)
        left_out = record.get("left_out", {})
        tasks_found = {
            task: float(metrics[main_metric(metrics)])
            for task, metrics in record["tasks"].items()
            if task not in left_out
        }
        return Scored(tasks_found, left_out, load_tensors(path / DOCUMENTS), record["seconds"])

    def _alone(self, path: Path) -> AbstractContextManager[None]:
        """Let one process at a time make what `path` is to hold; others wait, and find it there."""
        return locked(self._folder / "locks" / f"{path.parent.name}-{path.name}")


def cost_file(made: Path) -> Path:
    """Where the seconds and the peak memory that making a proxy or an adapter for the LLM took are kept."""
    return made.with_name(f"{made.name}.json")


def read_cost(made: Path) -> dict[str, float]:
    """Seconds and peak memory of making it; none if a kill came between it and its record."""
    file = cost_file(made)
    return dict(read_json(file)) if file.is_file() else {}


def of_proxy(experiment: Experiment, folder: Path) -> tuple[Experiment, str]:
    """The experiment that a proxy is made by, and its key. One that keeps all blocks is the same for all seeds."""
    whole = experiment.compress.remove == 0 and experiment.heal.steps == 0
    heal = dataclasses.replace(experiment.heal, realign_steps=0)
    experiment = dataclasses.replace(experiment, seed=0 if whole else experiment.seed, heal=heal)
    return experiment, _key(experiment, folder, "llm", "compress", "heal", "seed")


def of_training(experiment: Experiment, label: str, folder: Path) -> tuple[Experiment, str]:
    """The experiment that a training goes by, and its key; how it is plugged in makes it no other training."""
    experiment = dataclasses.replace(experiment, name=label, fuse=Fuse(), compare=None)
    return experiment, _key(experiment, folder, "llm", "compress", "heal", "train", "federate", "seed", "name")


def of_fused(experiment: Experiment, training: str, folder: Path) -> str:
    """The key of what the training of this key learned, plugged in as the experiment says."""
    return f"{training}-{_key(experiment, folder, 'fuse')}"


def _key(experiment: Experiment, folder: Path, *parts: str) -> str:
    """What work is found by, paths counted from its folder: a project that is moved as a whole finds its own."""
    values = from_folder(experiment.as_dict(), folder.resolve())
    return digest({part: values[part] for part in parts})[:16]


def digest(value: object) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
