"""Merge rules from sums alone: what each client gives, and what the sums make, where nobody sees a single update.

Two sums are opened in a round. The first counts signs: how many clients move a coordinate up and how many down, of the
whole updates and of the trimmed ones. The second adds values, w_k · τ̂_k, of the clients of the elected sign. The same
values are never summed with other weights as well: the difference of two such sums would be an outlier's update. Each
client finds its own weight, so that no server can let one client's values stand out.

H-TIES departs from Eq. 5-14 (docs/method.md) where single updates would be needed:

- The number of clients elects a sign, not their weighted mass (Eq. 13).
- The mean divides by the number of clients of the elected sign times the mean weight (Eq. 14). The sum of their weights
  would tell who they are.
- A coordinate whose elected sign has fewer than `LEAST` clients is not merged. Of a sum of two, each knows the other's.
- The similarity of a client to the others is the mean cosine of its update and the others' signs (Eq. 5). Weight and
  retention (Eq. 6, 10) follow from that of the round before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedproxy.aggregation.merge.top_k import kept_count, thresholds, trimmed

LEAST = 3
"""Clients whose values are summed, at least: of the sum of two, each of them knows the other's."""


@dataclass(frozen=True)
class Signs:
    """How many clients move each coordinate, int64 [P] each.

    Attributes:
        up: Clients whose update is positive.
        down: Clients whose update is negative.
        kept_up: Clients whose trimmed update is positive.
        kept_down: Clients whose trimmed update is negative.
    """

    up: torch.Tensor
    down: torch.Tensor
    kept_up: torch.Tensor
    kept_down: torch.Tensor


def signs(update: torch.Tensor, cut: torch.Tensor) -> list[torch.Tensor]:
    """What a client counts for: the columns of `Signs`, 0 or 1, bool [P] each.

    Args:
        update: τ_k, [P].
        cut: τ̂_k, [P], Eq. 11.
    """
    return [update > 0, update < 0, cut > 0, cut < 0]


def kept(update: torch.Tensor, share: float) -> torch.Tensor:
    """τ̂_k, Eq. 11: the ⌊share · P⌋ entries of largest magnitude, else 0; of equal magnitudes the lower index is kept.

    Args:
        update: τ_k, [P].
        share: r_k, from 0 to 1.
    """
    vector = {"": update}
    limits = thresholds([vector], [kept_count(share, update.numel())])
    return torch.cat([values[0].clone() for _, values in trimmed([vector], limits)])


def elected(counted: Signs, rho: float, least: int) -> torch.Tensor:
    """The sign that is merged at each coordinate: + if p ≥ ρ·n and p > 0, - if n ≥ ρ·p and n > 0, else 0.

    p and n are the numbers of clients whose trimmed update is positive and negative.

    Args:
        counted: The first sum.
        rho: ρ.
        least: Clients that the elected sign needs.

    Returns:
        -1, 0 or 1, int8 [P].
    """
    p, n = counted.kept_up, counted.kept_down
    up = (p >= rho * n) & (p >= least)
    down = ~((p >= rho * n) & (p > 0)) & (n >= rho * p) & (n >= least)
    return up.to(torch.int8) - down.to(torch.int8)


def agreeing(cut: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """What of a client's trimmed update has the elected sign, [P]; the rest is 0."""
    return torch.where(cut.sign() == chosen, cut, 0.0)


def agreement(update: torch.Tensor, counted: Signs, clients: int) -> float:
    """Similarity of a client to the others: the mean over j ≠ k of cos(τ_k, sign τ_j), which the counts give at once.

    Σ_j sign τ_j is up - down, less the client's own signs. A sign vector's norm is taken as √P.

    Args:
        update: τ_k, [P].
        counted: The first sum, in which the client took part.
        clients: K, the clients that it counts.

    Returns:
        From -1 to 1; 0 for a single client or an update of zeros.
    """
    wide = update.double()
    norm = float(wide.norm())
    if clients < 2 or norm == 0.0:
        return 0.0
    others = (counted.up - counted.down).double() - wide.sign()
    return float(wide @ others) / ((clients - 1) * norm * math.sqrt(update.numel()))


def heterogeneity(agreements: Sequence[float]) -> list[float]:
    """The heterogeneity h_k = 1 - max(0, s_k), with `agreement` for s_k; cf. Eq. 5."""
    return [1.0 - max(0.0, value) for value in agreements]


def weight(own: float, top: float, clients: int) -> float:
    """A client's weight in largest weights, w_k / max_j w_j of w = softmax_k((K-1)·|s_k|); cf. Eq. 6.

    Args:
        own: s_k, its `agreement`.
        top: The largest |s_j|, by which each client finds its weight without the others'.
        clients: K.

    Returns:
        exp((K-1)·(|s_k| - top)), at most 1.
    """
    return min(1.0, math.exp((clients - 1) * (abs(own) - top)))


def mean_of(total: torch.Tensor, chosen: torch.Tensor, counted: Signs, mean_weight: float) -> torch.Tensor:
    """The merged update of the second sum: Σ w_k τ̂_k over the elected sign's clients / (their number · mean weight).

    Args:
        total: The second sum, float64 [P].
        chosen: The elected signs, [P].
        counted: The first sum.
        mean_weight: Mean of the weights of the clients of the second sum.

    Returns:
        [P], 0 where no sign was elected.
    """
    count = torch.where(chosen > 0, counted.kept_up, counted.kept_down)
    return torch.where(chosen != 0, total / (count.clamp(min=1) * mean_weight), 0.0)


def conflict_levels(counted: Signs, clients: int) -> torch.Tensor:
    """K - |Σ_k sign τ_k|, the numerator of the conflict of Eq. 7, int64 [P]."""
    return clients - (counted.up - counted.down).abs()
