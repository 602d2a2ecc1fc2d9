"""Perplexity: the blocks go one by one, each time the one whose removal raises the perplexity on public text least."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fedproxy.compression.scores.contract import Importance
from fedproxy.errors import ArtifactError

if TYPE_CHECKING:
    from fedproxy.models.block_stream import BlockStream, Passage


def perplexity(
    stream: "BlockStream",
    passages: Sequence["Passage"],
    *,
    most: int,
    among: range,
    seed: int,
    progress: Callable[[float], None],
) -> Importance:
    """Remove blocks greedily by the perplexity of what is left; of equal ones the lower number stays.

    At each step every block that is left is tried, and the best one of `among` goes. With NLL(S) the mean of
    -log p(token | tokens before it) of the decoder without the blocks S, the score of a removed block is

        NLL(removed before it and itself) - NLL(none),

    the increase of the log-perplexity over the LLM's at the time it went, in nats a token; where a removal *lowers* the
    perplexity, the score is that of the block removed before it, so that scores never fall in the order of removal. A
    block that was never removed has its value of the last step, at least that of the last block removed.

    Each step walks the blocks once: one hidden state of every passage is carried for the decoder so far, and one for
    each block that is left out. Arguments are as of `Score`; the seed is not used. If `most` is 0, one step is measured
    and nothing removed.

    Returns:
        Scores in nats a token, and nested removals.

    Raises:
        ArtifactError: no document has two tokens, or a loss is no finite number.

    Reference:
        Kim et al., "Shortened LLaMA" (arXiv 2402.02834), Section 3.1, the "PPL" criterion, there measured once; Song et
        al., "SLEB" (arXiv 2402.09025), Algorithm 1, greedy as here.
    """
    steps = max(most, 1)
    scores, removed, left = [0.0] * len(stream), list[int](), list(range(len(stream)))
    floor, base = -math.inf, 0.0
    for step in range(steps):

        def step_progress(done: float, step: int = step) -> None:
            progress((step + done) / steps)

        losses, without = _losses(stream, passages, left, step_progress)
        base = losses if step == 0 else base
        goes = min(set(left).intersection(among) or left, key=lambda block: (without[block], -block))
        floor = max(floor, without[goes] - base)
        for block in left:
            scores[block] = max(floor, without[block] - base)
        if most:
            removed.append(goes)
            left.remove(goes)
    return Importance(scores, [sorted(removed[:count]) for count in range(most + 1)])


def passed(blocks: int, kept: int) -> tuple[float, int]:
    """How many blocks and heads a token passes: with n blocks left, those of the decoder, and without each of them."""
    steps = range(blocks, min(kept, blocks - 1), -1)
    return sum(n + (n - 1) * n / 2 for n in steps), sum(n + 1 for n in steps)


def _losses(
    stream: "BlockStream", passages: Sequence["Passage"], left: Sequence[int], progress: Callable[[float], None]
) -> tuple[float, dict[int, float]]:
    """NLL of the decoder of the blocks `left`, and without each of them, in nats a token."""
    whole = stream.carried(passage.hidden for passage in passages)
    without: dict[int, list[torch.Tensor]] = {}
    for place, (number, _) in enumerate(stream.walk(left)):
        skipping = stream.carried(whole)
        for states in (whole, *without.values()):
            for passage, state in zip(passages, states, strict=True):
                state.copy_(stream.run(number, passage, state))
        without[number] = skipping
        progress((place + 1) / len(left))
    return mean_loss(stream, passages, whole, "the LLM"), {
        number: mean_loss(stream, passages, states, f"the LLM without block {number}")
        for number, states in without.items()
    }


def mean_loss(stream: "BlockStream", passages: Sequence["Passage"], states: Sequence[torch.Tensor], who: str) -> float:
    """Mean of -log p(token | tokens before it) over all tokens of all passages but the first ones, in nats.

    Args:
        stream: The decoder.
        passages: The batches.
        states: What left the last block, for each batch.
        who: Whose hidden states they are, for errors.

    Raises:
        ArtifactError: no document has two tokens, or the loss is no finite number.
    """
    found = [stream.losses(passage, state) for passage, state in zip(passages, states, strict=True)]
    loss, tokens = sum(loss for loss, _ in found), sum(count for _, count in found)
    if not tokens:
        raise ArtifactError("no document of the public text has two tokens. Give longer documents.")
    if not math.isfinite(loss):
        raise ArtifactError(
            f"the loss of {who} on the public text is {loss}: its hidden states overflow. Convert the checkpoint to "
            "bfloat16 or float32."
        )
    return loss / tokens
