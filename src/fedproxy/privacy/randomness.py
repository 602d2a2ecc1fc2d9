"""Random numbers that nobody can foretell, or, for tests, that a seed gives again."""

import os
from collections.abc import Callable

import numpy as np
import torch

_PIECE = 1 << 20
"""So many numbers are made at once: what they take in between is some ten times their own memory."""
_SUMMANDS = 4
"""Each Gaussian is the scaled sum of so many, so that the gaps between floating-point numbers tell nothing of it.

Holohan and Braghin, "Secure Random Sampling in Differential Privacy", ESORICS 2021 (arXiv 2107.10138).
"""


class Randomness:
    """The draws of a private training: which rows take part, and the noise.

    Args:
        seed: For tests alone: the same draws again. Without one the bytes come from the operating system's generator,
            which is a cryptographic one, and nobody can have the same again.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._bytes: Callable[[int], bytes] = os.urandom if seed is None else np.random.default_rng(seed).bytes

    def uniform(self, count: int) -> np.ndarray:
        """Numbers from 0 to below 1, each a multiple of 2^-53, float64 [count]."""
        return (np.frombuffer(self._bytes(8 * count), np.uint64) >> np.uint64(11)) * 2.0**-53

    def chosen(self, count: int, probability: float) -> list[int]:
        """Which of `count` things are chosen, each with `probability`, independently of the others."""
        found: list[int] = np.flatnonzero(self.uniform(count) < probability).tolist()
        return found

    def normal(self, count: int) -> torch.Tensor:
        """Gaussians of mean 0 and variance 1, float64 [count], by Box and Muller's transform."""
        found = torch.empty(count, dtype=torch.float64)
        for begin in range(0, count, _PIECE):
            part = found[begin : begin + _PIECE]
            part.copy_(torch.from_numpy(self._normal(len(part))))
        return found

    def _normal(self, count: int) -> np.ndarray:
        radii = np.sqrt(-2 * np.log1p(-self.uniform(_SUMMANDS * count)))
        angles = 2 * np.pi * self.uniform(_SUMMANDS * count)
        whole: np.ndarray = (radii * np.cos(angles)).reshape(_SUMMANDS, count).sum(0) / np.sqrt(_SUMMANDS)
        return whole

    def seed(self) -> int:
        """A seed of 63 bits for a generator of another kind."""
        return int.from_bytes(self._bytes(8), "little") >> 1
