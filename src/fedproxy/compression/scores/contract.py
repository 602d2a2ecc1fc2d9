"""The contract of a score: what it is given, and what it says of the blocks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fedproxy.errors import ArtifactError

if TYPE_CHECKING:
    from fedproxy.models.block_stream import BlockStream, Passage


@dataclass(frozen=True)
class Importance:
    """What a score says.

    Attributes:
        scores: One number per block, in order: how much it matters.
        removals: For n = 0, 1, ..., the blocks to remove when n have to go, rising; as far as the score was asked.

    Raises:
        ArtifactError: a score is NaN.
    """

    scores: list[float]
    removals: list[list[int]]

    def __post_init__(self) -> None:
        nan = [block for block, score in enumerate(self.scores) if math.isnan(score)]
        if nan:
            raise ArtifactError(
                f"the score of block {nan[0]} is NaN: the LLM's weights, or its hidden states on the public text, "
                "overflow. Convert the checkpoint to bfloat16 or float32."
            )


class Score(Protocol):
    """A way to score the blocks of a decoder."""

    def __call__(
        self,
        stream: "BlockStream",
        passages: Sequence["Passage"],
        *,
        most: int,
        among: range,
        seed: int,
        progress: Callable[[float], None],
    ) -> Importance:
        """Score every block.

        Args:
            stream: The decoder.
            passages: Public text that stands before the first block, to be left there; empty for scores that read none.
            most: The largest number of blocks that will be removed.
            among: The blocks that may be removed, at least `most`; the others are kept.
            seed: For scores that draw.
            progress: Told the fraction done.
        """


@dataclass(frozen=True)
class Registered:
    """A row of the registry.

    Attributes:
        name: Its name in configurations.
        score: The function.
        reads_text: Whether it runs the model on public text.
        passed: How many blocks and heads a token of that text passes, where an LLM of so many blocks keeps so many; the
            decoder once if not given.
    """

    name: str
    score: Score
    reads_text: bool
    passed: Callable[[int, int], tuple[float, int]] = lambda blocks, kept: (blocks, 0)
