"""H-TIES: TIES with trimming and weights that follow the clients' heterogeneity."""

from dataclasses import dataclass

import torch

from fedproxy.federation.analyse import describe
from fedproxy.federation.merge.rule import Rule, require_range

ROUNDING = 1e-12
"""Masses this close (relatively) count as equal, so that the order of summation cannot turn an election."""


@dataclass(frozen=True)
class HTiesOptions:
    """Options of `h-ties`.

    Attributes:
        rho: How many times the other sign's mass a sign needs to be elected.
        r0: Share of its coordinates that the least heterogeneous client keeps, Eq. 10.
        delta: How much less the most heterogeneous client keeps, Eq. 10.
    """

    rho: float = 1.1
    r0: float = 1.0
    delta: float = 0.2

    def __post_init__(self) -> None:
        require_range("h-ties", "rho", self.rho, 1.0, 1e6)
        require_range("h-ties", "r0", self.r0, 0.0, 1e6)
        require_range("h-ties", "delta", self.delta, 0.0, 1e6)


def h_ties(values: torch.Tensor, weights: torch.Tensor, options: HTiesOptions) -> torch.Tensor:
    """Elect a dominant sign by weighted mass, drop coordinates without one, average those that agree.

    With p and n the masses Σ |w_k τ_k| of the positive and the negative entries: + if p ≥ ρ·n and p > 0, else
    - if n ≥ ρ·p and n > 0, else dropped (zero). merged = Σ w_k τ_k / Σ w_k over the clients of the elected sign.

    Args:
        values: Trimmed updates [K, n], float64.
        weights: Eq. 6, [K].
        options: `rho` is used here.

    Returns:
        [n].

    Reference: FedProxy (arXiv 2604.19015), Eq. 11-14. We compare masses up to a relative 1e-12.
    """
    column = weights[:, None]
    positive, negative = values > 0, values < 0
    p = (values * positive * column).sum(dim=0)
    n = -(values * negative * column).sum(dim=0)
    rho = options.rho * (1.0 - ROUNDING)
    up = (p >= rho * n) & (p > 0)
    down = ~up & (n >= rho * p) & (n > 0)
    return torch.where(
        up,
        p / (positive * column).sum(dim=0),
        torch.where(down, -n / (negative * column).sum(dim=0), 0.0),
    )


H_TIES = Rule(
    name="h-ties",
    options=HTiesOptions,
    keep=lambda analysis, options: analysis.retention,
    weights=lambda analysis, rows, options: analysis.weights,
    combine=h_ties,
    describe=lambda statistics, options: describe(statistics, options.r0, options.delta),
)
