"""Whether one method is better than another: paired differences, with an interval that tells what the documents say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedproxy.errors import UsageError
from fedproxy.metrics import Verdict, verdict

DRAWS, LEVEL = 2000, 0.95
"""Bootstrap samples, and the share of them that the interval holds."""
_AT_ONCE = 1 << 22

Scores = Mapping[str, Sequence[Sequence[float]]]
"""Task → for each seed, the score of every document, in one order for all seeds and methods."""


@dataclass(frozen=True)
class Difference:
    """How much more one method scores than another.

    Attributes:
        mean: Mean over tasks and seeds of the mean difference over the documents.
        low: Lower end of its interval.
        high: Upper end.
        by_seed: The same difference for each seed.
        verdict: As of `metrics.verdict`.
    """

    mean: float
    low: float
    high: float
    by_seed: list[float]
    verdict: Verdict


def paired_difference(
    scores: Scores, others: Scores, *, seed: int, draws: int = DRAWS, level: float = LEVEL
) -> Difference:
    """Compare two methods that were scored on the same documents with the same seeds.

    With x and y the scores of document i of task t for seed s, D = mean_t mean_i d_t,i, where d_t,i = mean_s (x - y).
    The interval is the bootstrap's percentiles of D over the documents: each sample draws the documents of each task
    anew, with replacement, one draw for all seeds. It says how far another set of documents may change the difference
    between *these* trainings; how far another seed may, `by_seed` shows.

    Args:
        scores: The one method's, x.
        others: The other's, y.
        seed: Seed of the draws.
        draws: Bootstrap samples.
        level: Share of them within the interval.

    Raises:
        UsageError: the tasks, seeds or documents are not the same, or there are none.

    Reference: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, Chapter 13.
    """
    if scores.keys() != others.keys() or not scores:
        raise UsageError(f"There are no scores of the same tasks to compare: {sorted(scores)} and {sorted(others)}.")
    by_task = {task: _differences(task, scores[task], others[task]) for task in sorted(scores)}
    if len({len(found) for found in by_task.values()}) > 1:
        raise UsageError("Tasks were scored with different numbers of seeds; score each with all.")
    by_seed = np.mean([found.mean(axis=1) for found in by_task.values()], axis=0)
    generator = np.random.default_rng(seed)
    sampled = np.mean([_resampled(found.mean(axis=0), draws, generator) for found in by_task.values()], axis=0)
    low, high = (float(end) for end in np.quantile(sampled, [(1 - level) / 2, (1 + level) / 2]))
    seeds = by_seed.tolist()
    return Difference(float(by_seed.mean()), low, high, seeds, verdict(low, high, seeds))


def _differences(task: str, scores: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> np.ndarray:
    """The differences of a task, [seeds, documents]."""
    lengths = {len(row) for row in (*scores, *others)}
    if len(scores) != len(others) or len(lengths) != 1 or 0 in lengths:
        raise UsageError(f"{task}: the methods were not scored on the same documents with the same seeds.")
    return np.asarray(scores, dtype=np.float64) - np.asarray(others, dtype=np.float64)


def _resampled(differences: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Means of `draws` samples of the documents, [draws]."""
    count = len(differences)
    step = max(1, _AT_ONCE // count)
    return np.concatenate(
        [
            differences[generator.integers(count, size=(min(step, draws - begin), count))].mean(axis=1)
            for begin in range(0, draws, step)
        ]
    )
