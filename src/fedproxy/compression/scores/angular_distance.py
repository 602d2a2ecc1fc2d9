"""Angular distance: how far a run of consecutive blocks turns the hidden state that passes through it."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fedproxy.compression.scores.block_influence import cosine
from fedproxy.compression.scores.contract import Importance

if TYPE_CHECKING:
    from fedproxy.models.block_stream import BlockStream, Passage


def angular_distance(
    stream: "BlockStream",
    passages: Sequence["Passage"],
    *,
    most: int,
    among: range,
    seed: int,
    progress: Callable[[float], None],
) -> Importance:
    """Return, for every n, the run of n consecutive blocks that turns the hidden state least; it goes as a whole.

    d(l, n) = mean arccos(cos(h_l, h_{l+n})) / π, with h_l the hidden state entering block l, over all tokens that are
    no padding; for the run that ends with the last block, h is that block's output before the final norm. Of runs at
    equal distance the later one goes. A block's score is the smallest distance of a run of `most` blocks (of one block
    if none will be removed) that the block is in.

    Departure from the paper: it averages over the last token of every document only; all tokens are used here, so that
    a small public text gives a steady mean. The blocks are walked once; `most` + 1 hidden states of every passage are
    carried along. Arguments are as of `Score`; the seed is not used.

    Returns:
        Scores from 0 (a run through the block turns nothing) to 1, and runs of consecutive blocks to remove.

    Reference:
        Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), Section 3.
    """
    longest, tokens = max(most, 1), sum(int(passage.attention_mask.sum()) for passage in passages)
    distances = torch.full((len(stream), longest + 1), math.inf, dtype=torch.float64)
    distances[:, 1:] = 0
    window = [stream.carried(passage.hidden for passage in passages) for _ in range(longest + 1)]
    for number, _ in stream.walk():
        left = number + 1
        for place, passage in enumerate(passages):
            leaving = stream.run(number, passage, window[number % (longest + 1)][place])
            for run in range(1, min(longest, left) + 1):
                entered = window[(left - run) % (longest + 1)][place]
                cosines = cosine(entered[passage.real], leaving[passage.real]).clamp(-1, 1)
                distances[left - run, run] += cosines.arccos().sum() / math.pi
            window[left % (longest + 1)][place].copy_(leaving)
            progress((number + (place + 1) / len(passages)) / len(stream))
    distances /= tokens
    removals = [_best_run(distances, run, among) for run in range(most + 1)]
    starts = len(stream) - longest + 1
    scores = [
        float(distances[max(0, block - longest + 1) : min(block + 1, starts), longest].min())
        for block in range(len(stream))
    ]
    return Importance(scores, removals)


def _best_run(distances: torch.Tensor, run: int, among: range) -> list[int]:
    starts = among[: len(among) - run + 1] if run else ()
    start = min(starts, key=lambda first: (float(distances[first, run]), -first), default=0)
    return list(range(start, start + run))
