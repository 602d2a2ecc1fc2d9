"""Which blocks go: the lowest scores, the rest stays in its original order."""

import math
from collections.abc import Sequence

from fedproxy.errors import UsageError


def removed_count(blocks: int, remove: float) -> int:
    """The number of blocks that go, see `rounded_down`; none only if none is asked for.

    Raises:
        UsageError: `remove` is no share from 0 to below 1, leaves no block, or is above 0 and removes none.
    """
    count = rounded_down(blocks, remove)
    if remove > 0 and count == 0:
        least = f"{math.ceil(1e4 / blocks) / 1e4:g} at least, or " if blocks > 1 else ""
        raise UsageError(f"remove = {remove} removes none of the {blocks} blocks. Choose {least}0 to keep them all.")
    return count


def rounded_down(blocks: int, remove: float) -> int:
    """Return floor(remove * blocks); the product is rounded to nine digits first, so that 0.29 of 100 blocks are 29.

    Raises:
        UsageError: `remove` is no share from 0 to below 1, or leaves no block.
    """
    check_remove(remove)
    count = math.floor(round(remove * blocks, 9))
    if count >= blocks:
        raise UsageError(f"remove = {remove} leaves none of the {blocks} blocks. Choose a lower value.")
    return count


def check_remove(remove: float) -> None:
    """Check that `remove` is a share of blocks that can be removed.

    Raises:
        UsageError: it is not a number from 0 to below 1.
    """
    if not 0 <= remove < 1:
        raise UsageError(f"remove must be from 0 to below 1 (0.5 removes half of the blocks), got {remove}.")


def between(blocks: int, first: int, last: int, removed: int) -> range:
    """Return the blocks between the `first` and the `last` ones, so many each, that are always kept.

    Raises:
        UsageError: fewer than `removed`, which have to go, are between them.
    """
    middle = range(first, blocks - last)
    if len(middle) < removed:
        raise UsageError(
            f"keep_first = {first} and keep_last = {last} leave {len(middle)} of {blocks} blocks to remove from; "
            f"{removed} have to go. Remove or keep fewer."
        )
    return middle


def lowest(scores: Sequence[float], most: int, among: Sequence[int]) -> list[list[int]]:
    """Return the n blocks of `among` with the lowest scores for n = 0, ..., most; of equal ones the lower number stays.

    Example:
        >>> lowest([0.3, 0.1, 0.2, 0.1], 2, range(4))
        [[], [3], [1, 3]]

    Reference:
        FedProxy, section on compression, below Eq. 4.
    """
    ranked = sorted(among, key=lambda block: (scores[block], -block))
    return [sorted(ranked[:count]) for count in range(most + 1)]
