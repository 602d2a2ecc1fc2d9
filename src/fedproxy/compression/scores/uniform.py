"""Uniform: the blocks that stay are spread evenly, whatever they compute."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedproxy.compression.scores.contract import Importance

if TYPE_CHECKING:
    from fedproxy.models.block_stream import BlockStream, Passage


def evenly_spread(blocks: int, kept: int) -> list[int]:
    """Return round(i (blocks - 1) / (kept - 1)) for i = 0, ..., kept - 1, halves to the even number; [0] for one.

    Example:
        >>> evenly_spread(12, 6)
        [0, 2, 4, 7, 9, 11]
    """
    return [round(i * (blocks - 1) / (kept - 1)) for i in range(kept)] if kept > 1 else [0][:kept]


def uniform(
    stream: "BlockStream",
    passages: Sequence["Passage"],
    *,
    most: int,
    among: range,
    seed: int,
    progress: Callable[[float], None],
) -> Importance:
    """Keep the first and the last block of `among`, and blocks evenly between them; removals are not nested.

    Arguments are as of `Score`; of the stream only the number of blocks counts.

    Returns:
        Score 1 for a block that stays when `most` are removed, else 0.

    Reference:
        Xiao et al., "Offsite-Tuning" (arXiv 2302.04870), the layers of the emulator.
    """
    removals = [
        sorted(set(among).difference(among[place] for place in evenly_spread(len(among), len(among) - n)))
        for n in range(most + 1)
    ]
    progress(1.0)
    return Importance([float(block not in removals[most]) for block in range(len(stream))], removals)
