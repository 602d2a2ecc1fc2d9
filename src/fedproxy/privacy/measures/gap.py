"""What share of the gap between two models a third one closes, by scores of all three on the same documents."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedproxy.errors import UsageError
from fedproxy.privacy.measures.membership import DRAWS, LEVEL, Estimate, Floats

Scores = Mapping[str, Sequence[float]]
"""Task → the score of every document, in one order for all models."""


def share_of_gap(
    scores: Scores, bottom: Scores, top: Scores, *, seed: int, draws: int = DRAWS, level: float = LEVEL
) -> Estimate | None:
    """Measure (A(scores) - A(bottom)) / (A(top) - A(bottom)), with A the mean over tasks of the mean over documents.

    The interval is the bootstrap's percentiles: each sample draws the documents of each task anew, with replacement,
    one draw for all three models. The few samples that have no gap are left out.

    Args:
        scores: Of the model in question.
        bottom: Of the model whose share is 0.
        top: Of the model whose share is 1.
        seed: Seed of the draws.
        draws: Bootstrap samples.
        level: Share of them within the interval.

    Returns:
        The share; none if the interval of the gap is not above 0, so that there is no gap to tell.

    Raises:
        UsageError: the tasks or documents are not the same, or there are none.

    Example:
        >>> share_of_gap({"a": [1, 1, 0, 0]}, {"a": [0, 0, 0, 0]}, {"a": [1, 1, 1, 1]}, seed=0).value
        0.5

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, Chapter 13.
    """
    models = (scores, bottom, top)
    same = all(len({len(model.get(task, ())) for model in models}) == 1 and scores[task] for task in scores)
    if not same or not scores or len({frozenset(model) for model in models}) > 1:
        raise UsageError(f"There are no scores of three models on the same documents of: {', '.join(sorted(scores))}.")
    tasks = [np.array([model[task] for model in models], dtype=np.float64) for task in sorted(scores)]
    generator = np.random.default_rng(seed)
    samples = np.array([_accuracies(_resampled(task, generator) for task in tasks) for _ in range(draws)])
    gaps = samples[:, 2] - samples[:, 1]
    ends = [(1 - level) / 2, (1 + level) / 2]
    if np.quantile(gaps, ends[0]) <= 0:
        return None
    mine, lowest, highest = _accuracies(tasks)
    there = gaps > 0
    low, high = np.quantile((samples[there, 0] - samples[there, 1]) / gaps[there], ends)
    return Estimate(float((mine - lowest) / (highest - lowest)), float(low), float(high))


def _resampled(task: Floats, generator: np.random.Generator) -> Floats:
    """As many documents of a task, drawn with replacement, [models, documents]."""
    return task[:, generator.integers(task.shape[1], size=task.shape[1])]


def _accuracies(tasks: Iterable[Floats]) -> Floats:
    """The mean over tasks of the mean over documents, [models]."""
    means: Floats = np.mean([task.mean(axis=1) for task in tasks], axis=0)
    return means
