"""Random: blocks go in an order drawn by seed, to compare other scores with."""

from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING

from fedproxy.compression.scores.contract import Importance
from fedproxy.compression.select import lowest
from fedproxy.seeds import derive_seed

if TYPE_CHECKING:
    from fedproxy.models.block_stream import BlockStream, Passage


def random(
    stream: "BlockStream",
    passages: Sequence["Passage"],
    *,
    most: int,
    among: range,
    seed: int,
    progress: Callable[[float], None],
) -> Importance:
    """Draw the order in which the blocks go; whatever number goes, it is the beginning of that order.

    Arguments are as of `Score`; of the stream only the number of blocks counts. The same seed gives the same order.

    Returns:
        Scores: a block's place in the order, from 0 for the first to go.
    """
    count = len(stream)
    scores = [float(place) for place in Random(derive_seed(seed, "random score")).sample(range(count), count)]
    progress(1.0)
    return Importance(scores, lowest(scores, most, among))
