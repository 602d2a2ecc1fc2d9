"""Trimmed mean: per coordinate, leave the largest and the smallest values out and average the rest."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedproxy.aggregation.analyse import Analysis
from fedproxy.aggregation.merge.rule import Rule, require_range
from fedproxy.aggregation.merge.top_k import kept_count
from fedproxy.errors import UsageError


@dataclass(frozen=True)
class TrimmedMeanOptions:
    """Options of `trimmed-mean`.

    Attributes:
        trim: Share of the clients left out at each end of a coordinate's values, rounded down: with fewer than
            1/trim clients none is left out.
    """

    trim: float = 0.2

    def __post_init__(self) -> None:
        require_range("trimmed-mean", "trim", self.trim, 0.0, 0.5)


def central_mean(values: torch.Tensor, cut: int) -> torch.Tensor:
    """Per coordinate, the mean without the `cut` smallest and the `cut` largest values, summed in ascending order.

    Args:
        values: [K, n].
        cut: Below K/2.

    Returns:
        [n].
    """
    middle = values.sort(dim=0).values[cut : len(values) - cut]
    total = torch.zeros_like(middle[0])
    for row in middle:
        total += row
    return total / len(middle)


def trimmed_mean(values: torch.Tensor, weights: torch.Tensor, options: TrimmedMeanOptions) -> torch.Tensor:
    """With g = floor(trim · K): the mean of the K - 2g values between the g smallest and the g largest.

    Args:
        values: Updates [K, n], float64.
        weights: Not used: every client counts once.
        options: `trim` is used here.

    Returns:
        [n].

    Reference: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", 2018, Def. 2.
    """
    return central_mean(values, kept_count(options.trim, len(values)))


def _weights(analysis: Analysis, rows: Sequence[int] | None, options: TrimmedMeanOptions) -> None:
    """It weighs nobody.

    Raises:
        UsageError: trimming leaves no client.
    """
    cut = kept_count(options.trim, analysis.clients)
    if 2 * cut >= analysis.clients:
        raise UsageError(
            f"trimmed-mean: trim is {options.trim:g}, which leaves {cut} of {analysis.clients} clients out at each end "
            "and none to average. Set trim below 0.5."
        )


TRIMMED_MEAN = Rule(
    name="trimmed-mean",
    options=TrimmedMeanOptions,
    keep=lambda analysis, options: [1.0] * analysis.clients,
    weights=_weights,
    combine=trimmed_mean,
)
