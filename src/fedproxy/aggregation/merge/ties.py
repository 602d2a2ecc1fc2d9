"""TIES: trim each update, elect a sign per coordinate, average those that agree."""

from dataclasses import dataclass

import torch

from fedproxy.aggregation.merge.rule import Rule, equal_weights, require_range


@dataclass(frozen=True)
class TiesOptions:
    """Options of `ties`.

    Attributes:
        density: Share of its coordinates that each client keeps, those of largest magnitude.
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        require_range("ties", "density", self.density, 0.0, 1.0)


def ties(values: torch.Tensor, weights: torch.Tensor, options: TiesOptions) -> torch.Tensor:
    """Elect and merge: the sign of Σ_k τ_k,p, then the mean of the kept entries that have it.

    A coordinate whose sum is exactly zero elects no sign and becomes zero. Sums run in the order of the clients.

    Args:
        values: Trimmed updates [K, n], float64.
        weights: Not used: every client counts once.
        options: Not used here; trimming is done.

    Returns:
        [n].

    Reference: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023, Alg. 1, with λ = 1.
    """
    total, kept, agreeing = (torch.zeros_like(values[0]) for _ in range(3))
    for row in values:
        total += row
    for row in values:
        same = ((row > 0) & (total > 0)) | ((row < 0) & (total < 0))
        kept += torch.where(same, row, 0.0)
        agreeing += same
    return kept / agreeing.clamp(min=1.0)


TIES = Rule(
    name="ties",
    options=TiesOptions,
    keep=lambda analysis, options: [options.density] * analysis.clients,
    weights=lambda analysis, rows, options: equal_weights(analysis),
    combine=ties,
)
