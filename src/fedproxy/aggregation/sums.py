"""Merge rules from sums alone: what each client gives, and what the sums make, where nobody sees a single update.

The first sum of a round adds the weighted values w_k · τ_k of all clients, and counts how many clients move each
coordinate up and how many down. H-TIES opens a second one: the same values once more, of those who move a coordinate
up, at coordinates where up and down have `LEAST` clients each. So every value that comes out is a sum over `LEAST`
clients at least. The values of the second sum are those of the first to the last bit: were they weighted anew, the
difference of two sums would be an outlier's update. Each client finds its own weight, so that no server can let one
client's values stand out.

H-TIES departs from Eq. 5-14 (docs/method.md) where single updates would be needed:

- Nothing is trimmed (Eq. 10, 11): where few clients keep a coordinate, their sum would be one client's value.
- Where a side has fewer than `LEAST` clients, the sign of the sum of all is elected (Eq. 13), and the sum of all takes
  the place of the sum of those who agree (Eq. 14).
- The mean divides by the number of clients of the elected sign times the mean weight (Eq. 14). The sum of their weights
  would tell who they are.
- The similarity of a client to the others is the mean cosine of its update and the others' signs (Eq. 5). Its weight
  (Eq. 6) follows from that of the round before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedproxy.aggregation.merge.h_ties import dominant

LEAST = 3
"""Clients whose values are summed, at least: of the sum of two, each of them knows the other's."""


@dataclass(frozen=True)
class Signs:
    """How many clients move each coordinate, int64 [P] each.

    Attributes:
        up: Clients whose update is positive.
        down: Clients whose update is negative.
    """

    up: torch.Tensor
    down: torch.Tensor

    @property
    def contested(self) -> torch.Tensor:
        """Where both sides have `LEAST` clients, bool [P]."""
        return (self.up >= LEAST) & (self.down >= LEAST)


def signs(update: torch.Tensor) -> list[torch.Tensor]:
    """What a client counts for: the columns of `Signs`, bool [P] each.

    Args:
        update: τ_k, [P].
    """
    return [update > 0, update < 0]


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


def merged(
    total: torch.Tensor, positive: torch.Tensor | None, counted: Signs, mean_weight: float, rho: float
) -> torch.Tensor:
    """The merged update: what the elected sign's clients sum to, divided by their number and the mean weight.

    Args:
        total: Σ_k w_k τ_k, float64 [P].
        positive: Σ w_k τ_k over the clients whose entry is positive, float64 [P], read at contested coordinates alone;
            none if it was not opened, and no coordinate counts as contested.
        counted: How many clients there are of each sign.
        mean_weight: The mean of w_k.
        rho: How many times the other sign's mass a sign needs at contested coordinates, Eq. 13.

    Returns:
        float64 [P].
    """
    side = torch.where(total > 0, counted.up, counted.down).clamp(min=1)
    found = total / side
    if positive is not None:
        negative = positive - total
        up, down = dominant(positive, negative, rho)
        decided = torch.where(up, positive / counted.up, torch.where(down, -negative / counted.down, 0.0))
        found = torch.where(counted.contested, decided, found)
    return found / mean_weight


def conflict_levels(counted: Signs, clients: int) -> torch.Tensor:
    """K - |Σ_k sign τ_k|, the numerator of the conflict of Eq. 7, int64 [P]."""
    return clients - (counted.up - counted.down).abs()
