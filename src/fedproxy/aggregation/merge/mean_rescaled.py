"""The mean, made as long as the updates are on average: a control for rules that owe their lead to a larger step."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedproxy.aggregation.analyse import Statistics
from fedproxy.aggregation.merge.mean import mean
from fedproxy.aggregation.merge.rule import Rule, equal_weights

ROUNDING = 1e-12
"""A mean whose squared norm is below this share of the updates' is what rounding left of nothing."""


@dataclass(frozen=True)
class MeanRescaledOptions:
    """`mean-rescaled` has no options."""


def rescaling(statistics: Statistics) -> Sequence[float]:
    """The factor s = (Σ_k ‖τ_k‖ / K) / ‖Σ_k τ_k / K‖ that gives the mean the updates' mean norm.

    It lies between 1, for updates of one direction, and √K, for orthogonal ones of one length; beyond for opposed ones.
    Where they cancel, it is 1.

    Args:
        statistics: Of K updates; their dot products are used.

    Returns:
        s for each client, [K].
    """
    gram, clients = statistics.gram, len(statistics.names)
    norms = gram.diagonal().sqrt()
    squared = float(gram.sum()) / clients**2
    cancelled = squared <= ROUNDING * float(gram.diagonal().mean())
    return [1.0 if cancelled else float(norms.mean()) / squared**0.5] * clients


MEAN_RESCALED = Rule(
    name="mean-rescaled",
    options=MeanRescaledOptions,
    keep=lambda analysis, options: [1.0] * analysis.clients,
    weights=lambda analysis, rows, options: equal_weights(analysis),
    combine=mean,
    scale=rescaling,
)
