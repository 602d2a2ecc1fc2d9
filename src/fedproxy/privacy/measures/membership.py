"""How well a score tells those who took part from those who did not: AUC, and the hits at few false alarms."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedproxy.errors import UsageError

DRAWS, LEVEL = 1000, 0.95
"""Bootstrap samples, and the share of them that an interval holds."""
FALSE_ALARMS = 0.01
"""The rate of false alarms at which hits are counted."""
Floats = NDArray[np.float64]
Group = tuple[ArrayLike, ArrayLike]
"""Scores of members and of non-members that are compared with each other; the higher, the likelier a member."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: The number.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """The probability that a member scores higher than a non-member, an equal score counting half.

    Args:
        members: Scores of members, [m].
        others: Scores of non-members, [n].

    Raises:
        UsageError: a side is empty, or a score is NaN.

    Example:
        >>> auc([3.0, 1.0], [2.0, 1.0])
        0.625
    """
    return float(_wins(*_checked(members, others)).mean())


def hits(members: ArrayLike, others: ArrayLike, false_alarms: float = FALSE_ALARMS) -> float:
    """Share of the members above a threshold that at most `false_alarms` of the non-members are above (TPR at FPR).

    Of fewer than 1 / false_alarms non-members none may be above it.

    Args:
        members: Scores of members, [m].
        others: Scores of non-members, [n].
        false_alarms: The rate that is allowed.

    Raises:
        UsageError: a side is empty, or a score is NaN.

    Example:
        >>> hits([3.0, 1.0], [2.0, 1.0])
        0.5

    Reference:
        Carlini et al., "Membership Inference Attacks From First Principles" (arXiv 2112.03570), Section IV.
    """
    first, second = _checked(members, others)
    return _hits(first, second, false_alarms)


def estimates(groups: Sequence[Group], *, seed: int, draws: int = DRAWS, level: float = LEVEL) -> dict[str, Estimate]:
    """AUC and hits, each the mean over groups, with percentile intervals of the bootstrap.

    Each sample draws the members and the non-members of each group anew, with replacement. Scores are compared within
    a group only, so that groups whose scores have different levels say nothing of membership by that.

    Args:
        groups: Scores of members and non-members, one pair a group.
        seed: Seed of the draws.
        draws: Bootstrap samples.
        level: Share of them within the interval.

    Returns:
        "auc" and "hits".

    Raises:
        UsageError: there is no group, a side of one is empty, or a score is NaN.

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, Chapter 13.
    """
    if not groups:
        raise UsageError("There are no scores to tell members by.")
    generator, checked = np.random.default_rng(seed), [_checked(*group) for group in groups]
    areas, shares = np.zeros(draws), np.zeros(draws)
    for members, others in checked:
        wins = _wins(members, others)
        ours, theirs = (generator.integers(len(side), size=(draws, len(side))) for side in (members, others))
        counted = np.stack([np.bincount(drawn, minlength=len(others)) for drawn in theirs])
        for number, (mine, weights) in enumerate(zip(ours, counted, strict=True)):
            areas[number] += (wins[mine] @ weights).mean() / len(others)
            shares[number] += _hits(members[mine], others[theirs[number]], FALSE_ALARMS)
    found = {
        "auc": (np.mean([_wins(*group).mean() for group in checked]), areas / len(checked)),
        "hits": (np.mean([_hits(*group, FALSE_ALARMS) for group in checked]), shares / len(checked)),
    }
    ends = [(1 - level) / 2, (1 + level) / 2]
    result = {}
    for name, (value, drawn) in found.items():
        low, high = (float(end) for end in np.quantile(drawn, ends))
        result[name] = Estimate(float(value), low, high)
    return result


def _checked(members: ArrayLike, others: ArrayLike) -> tuple[Floats, Floats]:
    first, second = (np.asarray(side, dtype=np.float64) for side in (members, others))
    if not (first.size and second.size) or bool(np.isnan(first).any() or np.isnan(second).any()):
        raise UsageError(
            f"Scores of {first.size} members and {second.size} non-members: give at least one of each, and none NaN."
        )
    return first, second


def _wins(members: Floats, others: Floats) -> Floats:
    """1 where a member scores higher than a non-member, 0.5 where equally, [m, n]."""
    ours, theirs = members[:, None], others[None, :]
    return (1.0 * (ours > theirs) + 1.0 * (ours >= theirs)) / 2


def _hits(members: Floats, others: Floats, false_alarms: float) -> float:
    threshold = np.sort(others)[::-1][int(false_alarms * len(others))]
    return float((members > threshold).mean())
