"""How much likelier a model finds a secret than secrets of the same form that nobody inserted."""

import math
from collections.abc import Sequence

import numpy as np

from fedproxy.errors import UsageError
from fedproxy.privacy.measures.membership import DRAWS, LEVEL, Estimate

CHANCE = 1 / math.log(2)
"""Mean exposure of a secret that was never inserted, of many candidates: that of a rank drawn evenly."""


def exposure(secret: float, candidates: Sequence[float]) -> float:
    """log2 of the number of possible ranks, less log2 of the secret's rank by its loss; in bits.

    The rank is 1 where no candidate has a lower loss. Equal losses count half, so that a model that tells nothing
    apart exposes nothing but one bit.

    Args:
        secret: The secret's loss, in any unit.
        candidates: The losses of other secrets of the same form, drawn as the secret was.

    Returns:
        From 0 (the last) to log2(1 + number of candidates) (the first).

    Raises:
        UsageError: there is no candidate, or a loss is NaN.

    Example:
        >>> exposure(1.0, [2.0, 3.0, 4.0]), exposure(5.0, [2.0, 3.0, 4.0])
        (2.0, 0.0)

    Reference:
        Carlini et al., "The Secret Sharer" (arXiv 1802.08232), Section 4.4.
    """
    if not candidates or any(math.isnan(loss) for loss in (secret, *candidates)):
        raise UsageError(f"An exposure needs losses of candidates, and none NaN; there are {len(candidates)}.")
    rank = 1 + sum(loss < secret for loss in candidates) + sum(loss == secret for loss in candidates) / 2
    return math.log2((len(candidates) + 1) / rank)


def mean(values: Sequence[float], *, seed: int) -> Estimate:
    """The mean of exposures, with the percentile interval of the bootstrap over them.

    Args:
        values: The exposures, at least one.
        seed: Seed of the draws.

    Raises:
        UsageError: there is none.
    """
    if not values:
        raise UsageError("There are no exposures to take the mean of.")
    drawn = np.random.default_rng(seed).choice(np.asarray(values), size=(DRAWS, len(values))).mean(axis=1)
    low, high = (float(end) for end in np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Estimate(sum(values) / len(values), low, high)
