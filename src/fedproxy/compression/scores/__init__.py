"""Scores of blocks by name: how much each block matters, and which to remove."""

from fedproxy.compression.scores.block_influence import block_influence
from fedproxy.compression.scores.contract import Importance, Registered, Score

__all__ = ["SCORES", "Importance", "Registered", "Score"]

SCORES: dict[str, Registered] = {
    "block-influence": Registered(block_influence, reads_text=True),
}
