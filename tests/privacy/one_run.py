"""Auditing differential privacy by one training: a lower bound of ε from guesses who took part.

Reference:
    Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023 (arXiv 2305.08846): each of
    m canaries takes part by a fair coin, the auditor guesses of some of them whether they did, and Theorem 5.2 bounds
    how many guesses can be right under (ε, δ).
"""

import math

import numpy as np
from scipy.stats import binom


def chance(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The probability, at most, that so many guesses are right although the training is (ε, δ)-private."""
    rate = 1 / (1 + math.exp(-epsilon))
    back = np.arange(1, right + 1)
    steepest = float((np.cumsum(binom.pmf(right - back, guesses, rate)) / back).max(initial=0.0))
    return min(1.0, float(binom.sf(right - 1, guesses, rate)) + 2 * canaries * delta * steepest)


def least_epsilon(canaries: int, guesses: int, right: int, delta: float, error: float = 0.05) -> float:
    """The ε that the training has at least, but for a probability of `error`; 0 if the guesses say nothing."""
    low, high = 0.0, 1.0
    while chance(canaries, guesses, right, high, delta) < error:
        high *= 2
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if chance(canaries, guesses, right, middle, delta) < error else (low, middle)
    return low
