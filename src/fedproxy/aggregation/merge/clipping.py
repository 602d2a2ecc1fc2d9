"""Norm clipping: around any rule, a limit to how long a client's update may be."""

import dataclasses
import math
import statistics as middle
from typing import Literal, TypeVar, cast

import torch

from fedproxy.aggregation.analyse import Statistics
from fedproxy.aggregation.merge.rule import Rule
from fedproxy.errors import UsageError

Options = TypeVar("Options")
Limit = float | Literal["median"]

CLIP_NORM = "clip_norm"
"""Name of the option, which every rule understands."""


def clip_factors(gram: torch.Tensor, limit: Limit) -> list[float]:
    """Factor that brings each update to at most the limit: min(1, limit / ‖τ_k‖).

    Args:
        gram: Dot products of the updates, [K, K], float64; their diagonal holds the squared norms.
        limit: Largest L2 norm, or "median" for the median of these norms (of an even number, the mean of the middle
            two). If most updates are zero the median is too, and then nothing of the others is left.

    Returns:
        [K], in 0 ... 1; 1 for a zero update.

    Reference: Sun et al., "Can You Really Backdoor Federated Learning?", 2019 (norm thresholding).
    """
    norms = gram.diagonal().sqrt().tolist()
    bound = middle.median(norms) if limit == "median" else limit
    return [bound / norm if norm > bound else 1.0 for norm in norms]


def clipped(rule: Rule[Options], limit: object) -> Rule[Options]:
    """The rule, seeing each update clipped to a norm.

    A positive factor changes neither cosines nor signs nor which coordinates of a client are the largest, so the
    analysis and what is kept stay those of the updates as they came; only `combine` sees the clipped values.

    Args:
        rule: Any rule. If it scales, it sees the dot products of the clipped updates.
        limit: Largest L2 norm of an update, or "median" (see `clip_factors`).

    Raises:
        UsageError: the limit is neither a finite number above zero nor "median".
    """
    number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if limit != "median" and not (number and 0 < cast(float, limit) < math.inf):
        raise UsageError(
            f'{rule.name}: {CLIP_NORM} is {limit!r}; it must be a finite number above 0, or "median" for the median '
            "of the updates' norms."
        )

    def scale(statistics: Statistics) -> list[float]:
        factors = clip_factors(statistics.gram, cast(Limit, limit))
        if rule.scale is None:
            return factors
        column = torch.tensor(factors, dtype=torch.float64, device=statistics.gram.device)
        clipped_gram = statistics.gram * column[:, None] * column
        scales = rule.scale(dataclasses.replace(statistics, gram=clipped_gram))
        return [factor * own for factor, own in zip(factors, scales, strict=True)]

    return dataclasses.replace(rule, scale=scale)
