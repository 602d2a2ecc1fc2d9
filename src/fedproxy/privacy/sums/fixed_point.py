"""Numbers as words of 32 bits whose sum modulo 2^32 is the sum of the numbers: fixed point, and packed counters."""

import math
from collections.abc import Sequence

import numpy as np

from fedproxy.errors import ArtifactError, UsageError
from fedproxy.privacy.randomness import Randomness

_WORD_BITS = 32
_LEAST_BITS = 2
_PIECE = 1 << 20
"""So many values are rounded at once: what they take in between is some ten times their own memory."""


def value_bits(members: int) -> int:
    """Bits that a value may have so that the sum over `members` cannot wrap: 32 - ⌈log₂ members⌉.

    Raises:
        UsageError: no bits are left for a value, or there is no member.
    """
    bits = _WORD_BITS - (members - 1).bit_length()
    if members < 1 or bits < _LEAST_BITS:
        raise UsageError(f"{members} members: between 1 and 2^30 can have a sum in words of 32 bits.")
    return bits


def quantised(values: np.ndarray, bound: float, bits: int, random: Randomness) -> np.ndarray:
    """Round values to multiples of bound / (2^(bits-1) - 1), up or down at random so that the mean is the value.

    q = ⌊x·s⌋ + Bernoulli(x·s - ⌊x·s⌋) with s = (2^(bits-1) - 1) / bound, in two's complement.

    Args:
        values: Numbers, floating point [k]; what lies beyond the bound is clipped to it.
        bound: The largest magnitude, > 0.
        bits: Bits of a value, as of `value_bits`.
        random: Where the roundings come from.

    Returns:
        The words, uint32 [k].

    Raises:
        UsageError: the bound or the bits are impossible.
        ArtifactError: a value is NaN or infinite.
    """
    levels = _levels(bound, bits)
    words = np.empty(len(values), np.uint32)
    for begin in range(0, len(values), _PIECE):
        part = np.asarray(values[begin : begin + _PIECE], np.float64)
        if not np.isfinite(part).all():
            raise ArtifactError("The values to be summed hold NaN or infinity. Train with a lower learning rate.")
        scaled = np.clip(part, -bound, bound) / bound * levels
        whole = np.floor(scaled)
        whole += random.uniform(len(part)) < scaled - whole
        words[begin : begin + _PIECE] = whole.astype(np.int64).astype(np.uint32)
    return words


def restored(words: np.ndarray, bound: float, bits: int) -> np.ndarray:
    """The numbers that (a sum of) quantised words stand for: words as signed whole numbers, times the step.

    Args:
        words: Words, uint32 [k].
        bound: As of `quantised`.
        bits: As of `quantised`.

    Returns:
        The numbers, float64 [k].

    Raises:
        UsageError: the bound or the bits are impossible.
    """
    return words.view(np.int32) / _levels(bound, bits) * bound


def packed_counts(columns: Sequence[np.ndarray], members: int) -> np.ndarray:
    """Pack columns of zeros and ones into words whose sum holds every column's count, in a field of its own.

    Each field has ⌈log₂(members + 1)⌉ bits; the first column has the lowest.

    Args:
        columns: Zeros and ones, [k] each.
        members: So many words are summed at most.

    Returns:
        The words, uint32 [k].

    Raises:
        UsageError: the fields do not fit 32 bits, or a column holds something else.
    """
    width = _field_bits(len(columns), members)
    words = np.zeros(len(columns[0]), np.uint32)
    for place, column in enumerate(columns):
        if not ((column == 0) | (column == 1)).all():
            raise UsageError(f"column {place} holds something else than 0 and 1.")
        words |= column.astype(np.uint32) << np.uint32(place * width)
    return words


def unpacked_counts(words: np.ndarray, fields: int, members: int) -> list[np.ndarray]:
    """The counts in summed words of `packed_counts`.

    Args:
        words: The sum, uint32 [k].
        fields: The number of columns.
        members: As of `packed_counts`.

    Returns:
        A count for each column, uint32 [k] each.

    Raises:
        UsageError: the fields do not fit 32 bits.
    """
    width = _field_bits(fields, members)
    largest = np.uint32((1 << width) - 1)
    return [(words >> np.uint32(place * width)) & largest for place in range(fields)]


def _levels(bound: float, bits: int) -> int:
    if not (math.isfinite(bound) and bound > 0):
        raise UsageError(f"the bound of values is {bound}; it must be a number above 0.")
    if not _LEAST_BITS <= bits <= _WORD_BITS:
        raise UsageError(f"a value has {bits} bits; it must be between {_LEAST_BITS} and {_WORD_BITS}.")
    return (1 << (bits - 1)) - 1


def _field_bits(fields: int, members: int) -> int:
    width = members.bit_length()
    if fields < 1 or members < 1 or fields * width > _WORD_BITS:
        raise UsageError(f"{fields} counters of up to {members} members do not fit a word of {_WORD_BITS} bits.")
    return width
