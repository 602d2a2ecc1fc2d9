"""Which blocks stay: the highest scores, in their original order."""

import math
from collections.abc import Sequence

from fedproxy.errors import ArtifactError, UsageError


def check_remove(remove: float) -> None:
    """Check that `remove` is a share of blocks that can be removed.

    Raises:
        UsageError: it is not a number from 0 to below 1.
    """
    if not 0 <= remove < 1:
        raise UsageError(f"remove must be from 0 to below 1 (0.5 removes half of the blocks), got {remove}.")


def select(scores: Sequence[float], remove: float) -> list[int]:
    """Return the blocks to keep: the L - floor(remove * L) with the highest scores, ties to the lower number.

    The product is rounded to nine digits first, so that 0.29 of 100 blocks are 29.

    Args:
        scores: One score per block.
        remove: Share of the blocks to remove.

    Returns:
        Rising block numbers, 0-based.

    Raises:
        UsageError: `remove` is impossible, or leaves no block.
        ArtifactError: a score is NaN.

    Example:
        >>> select([0.3, 0.1, 0.2, 0.1], 0.5)
        [0, 2]

    Reference:
        FedProxy, section on compression, below Eq. 4.
    """
    check_remove(remove)
    nan = [block for block, score in enumerate(scores) if math.isnan(score)]
    if nan:
        raise ArtifactError(
            f"the score of block {nan[0]} is NaN: the LLM's hidden states overflow on the calibration text. "
            "Convert the checkpoint to bfloat16 or float32."
        )
    kept = len(scores) - math.floor(round(remove * len(scores), 9))
    if kept < 1:
        raise UsageError(f"remove = {remove} leaves none of the {len(scores)} blocks. Choose a lower value.")
    ranked = sorted(range(len(scores)), key=lambda block: (-scores[block], block))
    return sorted(ranked[:kept])
