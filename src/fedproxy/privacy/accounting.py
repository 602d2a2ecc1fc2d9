"""How much privacy trainings with noise cost, and how much noise a budget asks for.

A training is a number of steps. In each, every row takes part with the same probability, independently of the others
(Poisson sampling), and Gaussian noise is added to the sum of the rows' clipped gradients. Two data sets are neighbours
if one has one row more ("add or remove one row"). The reckoning is that of privacy loss distributions, by Google's
`dp-accounting`, on a grid that errs on the safe side.

Reference:
    Abadi et al., "Deep Learning with Differential Privacy", CCS 2016 (arXiv 1607.00133). Doroshenko et al., "Connect
    the Dots: Tighter Discrete Approximations of Privacy Loss Distributions", PETS 2022 (arXiv 2207.04380).
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from fedproxy.errors import MissingExtraError, UsageError

_FINE, _COARSE = 1e-4, 1e-3
"""Widths of the grid of privacy losses: of what is told, and of the search for the noise."""
_STRIDE, _CLOSE, _MOST = math.log(2), 1e-4, math.log(1e6)
"""Of the search for the logarithm of the noise: its strides, how close it comes to the least, and where it gives up."""
_NOTHING = 1e-9
"""An ε that is counted as none."""


@dataclass(frozen=True)
class Steps:
    """Steps of one kind.

    Attributes:
        sampling: Probability with which a row takes part in a step, above 0 and at most 1.
        noise: Standard deviation of the noise, in norms to which a row's gradient is clipped; with 0 there is none.
        count: How many there are.
    """

    sampling: float
    noise: float
    count: int


def require_accounting(table: str = "[train.privacy]") -> None:
    """Check that what reckons is installed.

    Args:
        table: What it is needed for.

    Raises:
        MissingExtraError: `dp-accounting` is not.
    """
    if find_spec("dp_accounting") is None:
        raise MissingExtraError(table, "privacy")


def default_delta(rows: int) -> float:
    """δ where none is given: n^-1.1, so that it is below one in n.

    Example:
        >>> default_delta(1000) < 1 / 1000
        True
    """
    return float(max(rows, 2) ** -1.1)


def epsilon_of(steps: Iterable[Steps], delta: float) -> float:
    """The ε at `delta` that steps cost together; infinite if a step has no noise.

    Raises:
        MissingExtraError: `dp-accounting` is not installed.

    Example:
        `epsilon_of([Steps(sampling=0.01, noise=1.1, count=10_000)], 1e-5)` → `5.19`
    """
    counts: dict[tuple[float, float], int] = {}
    for one in steps:
        counts[one.sampling, one.noise] = counts.get((one.sampling, one.noise), 0) + one.count
    return _epsilon(tuple(Steps(*kind, count) for kind, count in sorted(counts.items()) if count), delta, _FINE)


@functools.lru_cache(maxsize=256)
def _epsilon(steps: tuple[Steps, ...], delta: float, grid: float) -> float:
    if not steps:
        return 0.0
    require_accounting()
    import dp_accounting
    from dp_accounting import pld

    if any(one.noise == 0 for one in steps):
        return math.inf
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, grid)
    for one in steps:
        step = dp_accounting.PoissonSampledDpEvent(one.sampling, dp_accounting.GaussianDpEvent(one.noise))
        accountant.compose(step, one.count)
    return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=256)
def noise_for(epsilon: float, delta: float, sampling: float, count: int) -> float:
    """The least noise with which `count` steps cost at most `epsilon` at `delta`; see `Steps` for its unit.

    Raises:
        MissingExtraError: `dp-accounting` is not installed.
        UsageError: so small an ε cannot be had.

    Example:
        `noise_for(1.0, 1e-5, sampling=0.01, count=1)` → `0.674`
    """

    def over(noise_log: float) -> float:
        """By how much, in logarithms, the budget is overrun; it falls with the noise."""
        found = _epsilon((Steps(sampling, math.exp(noise_log), count),), delta, _COARSE)
        return math.log(max(found, _NOTHING) / epsilon)

    low = high = 0.0
    while over(high) > 0:
        low, high = high, high + _STRIDE
        if high > _MOST:
            raise UsageError(f"No noise makes {count} steps cost ε = {epsilon:g} at δ = {delta:g}. Choose a larger ε.")
    while over(low) <= 0:
        low, high = low - _STRIDE, low
    from scipy.optimize import brentq  # which dp-accounting needs, too

    found = float(brentq(over, low, high, xtol=_CLOSE / 2))
    while over(found) > 0:
        found += _CLOSE / 2
    return math.exp(found)
