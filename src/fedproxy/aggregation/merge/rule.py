"""What a merge rule is: a frozen row of pure functions and a dataclass of options."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from fedproxy.aggregation.analyse import DELTA, R0, Analysis, Statistics, retention
from fedproxy.registry import require_range as require_range

Options = TypeVar("Options")


@dataclass(frozen=True)
class Rule(Generic[Options]):
    """A merge rule.

    Attributes:
        name: Its name in configurations.
        options: Frozen dataclass of its options with defaults (float or Literal fields); it checks their values.
        keep: Share of its coordinates each client keeps, [K]: the largest magnitudes, the rest become zero.
        weights: Weight of each client, [K], summing to one, from the analysis, the clients' row counts (if known) and
            the options; none if the rule weighs nobody.
        combine: Trimmed values of some coordinates [K, n] and the weights [K], equal if there are none, both float64, →
            merged values [n]. It sees one chunk at a time, so it must treat each coordinate by itself.
        eq_10: The options → r0 and δ of Eq. 10, the share that each client keeps.
        by_rows: The options → whether `weights` looks at the clients' row counts.
        scale: Positive factor of each client's values, [K], from the collected statistics; `combine` alone sees the
            scaled values, the analysis and `keep` do not. None if all are one.
        from_sums: How the rule is had from sums alone (`aggregation.sums`): the options → ρ of the election, or none
            for the weighted mean of all. None if it needs single updates.
    """

    name: str
    options: type[Options]
    keep: Callable[[Analysis, Options], Sequence[float]]
    weights: Callable[[Analysis, Sequence[int] | None, Options], Sequence[float] | None]
    combine: Callable[[torch.Tensor, torch.Tensor, Options], torch.Tensor]
    eq_10: Callable[[Options], tuple[float, float]] = lambda options: (R0, DELTA)
    by_rows: Callable[[Options], bool] = lambda options: False
    scale: Callable[[Statistics], Sequence[float]] | None = None
    from_sums: Callable[[Options], float | None] | None = None

    def retained(self, heterogeneities: Sequence[float], options: Options) -> list[float]:
        """Eq. 10 with the rule's options, whatever it makes of it itself: the share of each client."""
        shares = retention(torch.tensor(heterogeneities, dtype=torch.float64), *self.eq_10(options))
        return [float(share) for share in shares]

    def first(self, options: Options) -> float:
        """The share, Eq. 10, of a client whose heterogeneity is not known yet: the highest."""
        return self.retained([0.0, 0.0], options)[0]


def equal_weights(analysis: Analysis) -> list[float]:
    """1/K for each client."""
    return [1.0 / analysis.clients] * analysis.clients
