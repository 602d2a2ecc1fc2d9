"""Which values of a run are kept, in bytes whose number follows from how many are.

The rarer of the kept and the dropped positions p_0 < p_1 < ... < p_{m-1} below n are written as Elias and Fano have it:
the l low bits of each packed, then a bitmap in which the bits (p_i >> l) + i are set. That takes about
m (2 + log2 n/m) bits, half a bit a position above the entropy. A bitmap of the n values takes its place where it is no
longer, about where a quarter to three quarters are kept; nothing is written where all values are kept, or none.

Reference: Elias, "Efficient Storage and Retrieval by Content and Address of Static Files", 1974. Fano, "On the Number
of Bits Required to Implement an Associative Memory", 1971.
"""

import torch

from fedproxy.errors import ArtifactError
from fedproxy.federation.wire.packing import pack, packed_bytes, unpack


def position_bytes(count: int, total: int) -> int:
    """Bytes that the positions of `count` of `total` values take."""
    marked = min(count, total - count)
    if not marked:
        return 0
    low = _low_bits(marked, total)
    return packed_bytes(total, 1) if low is None else _bytes(marked, total, low)


def most_position_bytes(count: int, totals: list[int]) -> int:
    """The most bytes that the positions of `count` values take, however they are spread over runs of so many values."""
    bitmaps = sum(packed_bytes(total, 1) for total in totals)
    # A run takes no more than with an l that all share; its two roundings to bytes add 14 bits at most.
    lows = range(max(totals, default=0).bit_length() + 1)
    shared = min(count * (low + 1) + sum(total >> low for total in totals) for low in lows)
    return min(bitmaps, packed_bytes(shared + 14 * len(totals), 1))


def encode_positions(kept: torch.Tensor) -> torch.Tensor:
    """The bytes of the positions.

    Args:
        kept: [n], bool.

    Returns:
        [position_bytes(kept.sum(), n)], uint8.
    """
    total, count = len(kept), int(kept.sum())
    marked = min(count, total - count)
    if not marked:
        return torch.empty(0, dtype=torch.uint8)
    low = _low_bits(marked, total)
    if low is None:
        return pack(kept, 1)
    positions = (kept if marked == count else ~kept).nonzero().view(-1)
    high = torch.zeros(_high_bits(marked, total, low), dtype=torch.bool)
    high[(positions >> low) + torch.arange(marked)] = True
    return torch.cat([pack(positions & ((1 << low) - 1), low), pack(high, 1)])


def decode_positions(packed: torch.Tensor, count: int, total: int, where: str) -> torch.Tensor:
    """The positions of the kept values.

    Args:
        packed: [position_bytes(count, total)], uint8.
        count: How many are kept, 0 ... `total`.
        total: Number n of values.
        where: What they are, for the error.

    Returns:
        [count], int64, rising.

    Raises:
        ArtifactError: the bytes mark more or fewer positions, one twice, or one beyond the last value.
    """
    marked = min(count, total - count)
    if not marked:
        return torch.arange(count)
    low = _low_bits(marked, total)
    if low is None:
        return _set_bits(packed, total, count, where)
    split = packed_bytes(marked, low)
    high = _set_bits(packed[split:], _high_bits(marked, total, low), marked, where) - torch.arange(marked)
    positions = high << low | unpack(packed[:split], marked, low, where)
    if int(positions[-1]) >= total or not (positions[1:] > positions[:-1]).all():
        raise ArtifactError(f"{where}: a position comes twice or too early, or lies beyond the last of {total} values.")
    if marked == count:
        return positions
    kept = torch.ones(total, dtype=torch.bool)
    kept[positions] = False
    return kept.nonzero().view(-1)


def _low_bits(marked: int, total: int) -> int | None:
    """The l that takes the fewest bytes; none where a bitmap takes no more."""
    low = min(range(total.bit_length()), key=lambda bits: _bytes(marked, total, bits))
    return low if _bytes(marked, total, low) < packed_bytes(total, 1) else None


def _bytes(marked: int, total: int, low: int) -> int:
    return packed_bytes(marked, low) + packed_bytes(_high_bits(marked, total, low), 1)


def _high_bits(marked: int, total: int, low: int) -> int:
    """The bit (p >> l) + i of the last position there can be, and all before it."""
    return marked + ((total - 1) >> low)


def _set_bits(packed: torch.Tensor, bits: int, count: int, where: str) -> torch.Tensor:
    """Where a bitmap of so many bits is set: [count], int64."""
    found = unpack(packed, bits, 1, where).nonzero().view(-1)
    if len(found) != count:
        raise ArtifactError(f"{where}: {len(found)} positions are marked, expected {count}.")
    return found
