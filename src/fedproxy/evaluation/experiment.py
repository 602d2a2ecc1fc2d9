"""What [evaluate] of an experiment says: which tasks its models are scored on, and how."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedproxy.config import Experiment
from fedproxy.evaluation.harness import evaluate
from fedproxy.evaluation.loading import load_for_evaluation


def scored_tasks(experiment: Experiment) -> list[str]:
    """The tasks that models are scored on: those of [evaluate], or the clients'."""
    cut = experiment.partition
    own = [client.task for client in experiment.client] if cut is None else [cut.task]
    return experiment.evaluate.tasks or list(dict.fromkeys(task for task in own if task))


def check_tasks(experiment: Experiment) -> None:
    """Load the tasks that will be scored once before anything else, so that a fault in them shows before the training.

    Raises:
        UsageError: a task is unknown, or has code that is not trusted.
        ArtifactError: its rows cannot be read.
    """
    settings = experiment.evaluate
    if tasks := scored_tasks(experiment):
        load_for_evaluation(tasks, data=settings.data, include=settings.include, trust_tasks=settings.trust_tasks)


def score(
    experiment: Experiment,
    tasks: Sequence[str],
    model: Any,
    adapter: Path | None = None,
    *,
    proxy: Path | None = None,
    tokenizer: Any = None,
    on_progress: Callable[[float, str], None],
    on_documents: Callable[[str, list[float]], None] | None = None,
) -> dict[str, Any]:
    """Score a model as [evaluate] says; result and errors are those of `evaluate`.

    Args:
        experiment: The experiment.
        tasks: The tasks.
        model: The checkpoint, or a loaded model.
        adapter: The adapter on it, or on the proxy.
        proxy: The proxy, for decode-time proxy tuning.
        tokenizer: The tokenizer of a loaded model.
        on_progress: Told the fraction and what is being done.
        on_documents: Told a task and the scores of its documents.
    """
    settings = experiment.evaluate
    return evaluate(
        model,
        tasks=tasks,
        data=settings.data,
        include=settings.include,
        trust_tasks=settings.trust_tasks,
        adapter=adapter,
        proxy=proxy,
        tokenizer=tokenizer,
        limit=settings.limit,
        batch_size=settings.batch_size,
        trust_remote_code=experiment.llm.trust_remote_code,
        on_progress=on_progress,
        on_documents=on_documents,
    )
