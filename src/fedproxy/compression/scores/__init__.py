"""Scores of blocks by name: how much each block matters, and which to remove."""

from fedproxy.compression.scores.angular_distance import angular_distance
from fedproxy.compression.scores.block_influence import block_influence
from fedproxy.compression.scores.contract import Importance, Registered, Score
from fedproxy.compression.scores.magnitude import magnitude
from fedproxy.compression.scores.perplexity import passed, perplexity
from fedproxy.compression.scores.random import random
from fedproxy.compression.scores.uniform import uniform
from fedproxy.registry import Axis

__all__ = ["SCORES", "Importance", "Registered", "Score"]

SCORES: Axis[Registered] = Axis(
    "score",
    "fedproxy.scores",
    Registered,
    {
        row.name: row
        for row in (
            Registered("angular-distance", angular_distance, reads_text=True),
            Registered("block-influence", block_influence, reads_text=True),
            Registered("magnitude", magnitude, reads_text=False),
            Registered("perplexity", perplexity, reads_text=True, passed=passed),
            Registered("random", random, reads_text=False),
            Registered("uniform", uniform, reads_text=False),
        )
    },
)
