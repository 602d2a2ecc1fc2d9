"""Block influence: how far a block turns the hidden state that passes through it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fedproxy.compression.scores.contract import Importance
from fedproxy.compression.select import lowest

if TYPE_CHECKING:
    from fedproxy.models.block_stream import BlockStream, Passage


def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the cosines of vectors [..., width] in float64, [...]; 0 where a vector is zero."""
    x, y = x.double(), y.double()
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    products = (x * y).sum(dim=-1)
    return torch.where(norms > 0, products / norms.where(norms > 0, 1.0), products * 0)


def block_influence(
    stream: "BlockStream",
    passages: Sequence["Passage"],
    *,
    most: int,
    among: range,
    seed: int,
    progress: Callable[[float], None],
) -> Importance:
    """Return the block influence of every block; those with the lowest go first.

    BI_i = 1 - mean cos(h_i, h_{i+1}), with h_i the hidden state entering block i and h_{i+1} the one leaving it, over
    all tokens that are no padding. For the last block, h_{i+1} is its own output before the final norm. Arguments are
    as of `Score`; the seed is not used.

    Returns:
        Scores from 0 (the block changes no direction) to 2.

    Reference:
        FedProxy, Eq. 4 (docs/method.md); ShortGPT (Men et al., arXiv 2403.03853), Eq. 1.
    """
    sums = torch.zeros(len(stream), dtype=torch.float64)
    hidden = stream.carried(passage.hidden for passage in passages)
    for number, _ in stream.walk():
        for place, passage in enumerate(passages):
            leaving = stream.run(number, passage, hidden[place])
            sums[number] += cosine(hidden[place][passage.real], leaving[passage.real]).sum()
            hidden[place].copy_(leaving)
            progress((number + (place + 1) / len(passages)) / len(stream))
    tokens = sum(int(passage.attention_mask.sum()) for passage in passages)
    scores = [float(value) for value in 1 - sums / tokens]
    return Importance(scores, lowest(scores, most, among))
