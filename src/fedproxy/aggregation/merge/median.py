"""Coordinate-wise median: up to half of the clients may send anything, and move a coordinate only within the others."""

from dataclasses import dataclass

import torch

from fedproxy.aggregation.merge.rule import Rule
from fedproxy.aggregation.merge.trimmed_mean import central_mean


@dataclass(frozen=True)
class MedianOptions:
    """`median` has no options."""


def median(values: torch.Tensor, weights: torch.Tensor, options: MedianOptions) -> torch.Tensor:
    """Per coordinate, the middle value; of an even number the mean of the middle two.

    Args:
        values: Updates [K, n], float64.
        weights: Not used: every client counts once.
        options: Not used.

    Returns:
        [n].

    Reference: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", 2018, Def. 1.
    """
    return central_mean(values, (len(values) - 1) // 2)


MEDIAN = Rule(
    name="median",
    options=MedianOptions,
    keep=lambda analysis, options: [1.0] * analysis.clients,
    weights=lambda analysis, rows, options: None,
    combine=median,
)
