"""H-TIES: TIES with trimming and weights that follow the clients' heterogeneity."""

from dataclasses import dataclass

import torch

from fedproxy.aggregation.analyse import DELTA, R0
from fedproxy.aggregation.merge.rule import Rule, require_range

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
    r0: float = R0
    delta: float = DELTA

    def __post_init__(self) -> None:
        require_range("h-ties", "rho", self.rho, 1.0, 1e6)
        require_range("h-ties", "r0", self.r0, 0.0, 1e6)
        require_range("h-ties", "delta", self.delta, 0.0, 1e6)


def h_ties(values: torch.Tensor, weights: torch.Tensor, options: HTiesOptions) -> torch.Tensor:
    """Elect a dominant sign by weighted mass, drop coordinates without one, average those that agree.

    With p and n the masses Σ |w_k τ_k| of the positive and the negative entries: + if p ≥ ρ·n and p > 0, else
    - if n ≥ ρ·p and n > 0, else dropped (zero). merged = Σ w_k τ_k / Σ w_k over the clients of the elected sign.
    Sums run in the order of the clients.

    Args:
        values: Trimmed updates [K, n], float64.
        weights: Eq. 6, [K].
        options: `rho` is used here.

    Returns:
        [n].

    Reference: FedProxy (arXiv 2604.19015), Eq. 11-14 (docs/method.md). We compare masses up to a relative 1e-12.
    """
    p, n, p_weights, n_weights = (torch.zeros_like(values[0]) for _ in range(4))
    for weight, row in zip(weights, values, strict=True):
        mass, positive, negative = weight * row, row > 0, row < 0
        p += torch.where(positive, mass, 0.0)
        n -= torch.where(negative, mass, 0.0)
        p_weights += torch.where(positive, weight, 0.0)
        n_weights += torch.where(negative, weight, 0.0)
    up, down = dominant(p, n, elected_from(options))
    return torch.where(up, p / p_weights, torch.where(down, -n / n_weights, 0.0))


def dominant(p: torch.Tensor, n: torch.Tensor, rho: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Where + is elected, and where -, Eq. 13: + if p ≥ ρ·n and p > 0, else - if n ≥ ρ·p and n > 0.

    Args:
        p: Mass of the positive entries, [n].
        n: Mass of the negative entries, [n].
        rho: ρ.

    Returns:
        bool [n] each.
    """
    up = (p >= rho * n) & (p > 0)
    return up, ~up & (n >= rho * p) & (n > 0)


def elected_from(options: HTiesOptions) -> float:
    """How many times the other sign's mass elects a sign: rho, less what rounding may take."""
    return options.rho * (1.0 - ROUNDING)


H_TIES = Rule(
    name="h-ties",
    options=HTiesOptions,
    keep=lambda analysis, options: analysis.retention,
    weights=lambda analysis, rows, options: analysis.weights,
    combine=h_ties,
    eq_10=lambda options: (options.r0, options.delta),
    from_sums=lambda options: options.rho,
)
