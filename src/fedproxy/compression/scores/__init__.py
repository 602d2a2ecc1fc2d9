"""Scores of blocks by name: how much each block matters; the lowest are removed.

A score takes the model, batches of calibration text and a function to report the fraction done to, and returns
one number per block, in order.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from fedproxy.compression.calibrate import Batch
from fedproxy.compression.scores.block_influence import block_influence
from fedproxy.models.checkpoints import Model


class Score(Protocol):
    """The contract of a score."""

    def __call__(self, model: Model, batches: Sequence[Batch], progress: Callable[[float], None]) -> list[float]:
        """Score every block of `model`."""


SCORES: dict[str, Score] = {"block-influence": block_influence}
