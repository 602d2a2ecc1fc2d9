"""Magnitude: how large the weights of a block are; no text is read."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedproxy.compression.scores.contract import Importance
from fedproxy.compression.select import lowest

if TYPE_CHECKING:
    from fedproxy.models.block_stream import BlockStream, Passage

_CHUNK = 1 << 22


def magnitude(
    stream: "BlockStream",
    passages: Sequence["Passage"],
    *,
    most: int,
    among: range,
    seed: int,
    progress: Callable[[float], None],
) -> Importance:
    """Return mean |w| over all weights w of every block; those with the lowest go first.

    Arguments are as of `Score`; passages and seed are not used. Blocks are read one after the other.

    Returns:
        Scores in the unit of the weights.

    Reference:
        Kim et al., "Shortened LLaMA" (arXiv 2402.02834), Section 3.1, the "Mag" criterion, there a sum; a mean is the
        same for blocks of one shape, and fair to blocks of several.
    """
    scores = []
    for number, block in stream.walk():
        scores.append(_mean_absolute(block))
        progress((number + 1) / len(stream))
    return Importance(scores, lowest(scores, most, among))


def _mean_absolute(block: nn.Module) -> float:
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for weight in block.parameters():
        count += weight.numel()
        for piece in torch.split(weight.detach().reshape(-1), _CHUNK):
            total += piece.double().abs().sum().cpu()
    return float(total) / count
