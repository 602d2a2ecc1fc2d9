"""SplitMix64: a random generator whose i-th value can be computed directly, so draws depend on key and index alone.

Reference: Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", 2014.
"""

import torch

_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def splitmix64(key: int, indices: torch.Tensor) -> torch.Tensor:
    """The values at `indices` (0 is the first) of the SplitMix64 sequence that starts from `key`.

    Args:
        key: Start of the sequence, 64 bits.
        indices: [n], int64.

    Returns:
        [n], int64: the bits of the unsigned 64-bit values.
    """
    state = (indices + 1) * _signed(_GAMMA) + _signed(key)
    for shift, factor in _ROUNDS:
        state = (state ^ shifted(state, shift)) * _signed(factor)
    return state ^ shifted(state, 31)


def shifted(values: torch.Tensor, shift: int) -> torch.Tensor:
    """The values, int64 read as unsigned numbers, shifted right by 1 ... 63."""
    return (values >> shift) & ((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
