"""Small whole numbers packed bit by bit, and the levels of a conflict as such.

Eight values of b ≤ 8 bits fill b bytes, the first value in the lowest bits of the first byte. Of wider values the
lowest bytes go first, all together, then what is left of them. Bits beyond the last value are zero.
"""

from math import prod

import torch

from fedproxy.errors import ArtifactError
from fedproxy.tensors import CHUNK_ELEMENTS

_BYTE = 8


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return -(-count * bits // _BYTE)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack values into as few bytes as they fill.

    Args:
        values: [n], whole numbers in 0 ... 2^bits - 1.
        bits: Bits of a value, 0 ... 63.

    Returns:
        [packed_bytes(n, bits)], uint8.

    Example:
        >>> pack(torch.tensor([1, 2, 3]), 4).tolist()
        [33, 3]
    """
    if bits > _BYTE:
        return torch.cat([(values & 0xFF).to(torch.uint8), pack(values >> _BYTE, bits - _BYTE)])
    count = len(values)
    packed = torch.zeros(-(-count // _BYTE), bits, dtype=torch.uint8)
    for start in range(0, count if bits else 0, CHUNK_ELEMENTS):
        eights = _words(values[start : start + CHUNK_ELEMENTS], bits).view(torch.uint8).view(-1, _BYTE)
        packed[start // _BYTE : start // _BYTE + len(eights)] = eights[:, :bits]
    return packed.view(-1)[: packed_bytes(count, bits)]


def _words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Eight values a word: [m] → [m / 8, rounded up], int64."""
    wide = torch.zeros(-(-len(values) // _BYTE) * _BYTE, dtype=torch.int64)
    wide[: len(values)] = values
    return (wide.view(-1, _BYTE) << _shifts(bits)).sum(dim=1)


def _shifts(bits: int) -> torch.Tensor:
    return torch.arange(_BYTE) * bits


def unpack(packed: torch.Tensor, count: int, bits: int, where: str) -> torch.Tensor:
    """The values that `pack` packed.

    Args:
        packed: [packed_bytes(count, bits)], uint8.
        count: Number n of values.
        bits: Bits of a value.
        where: What they are, for the error.

    Returns:
        [n], uint8, or int64 for more than 8 bits.

    Raises:
        ArtifactError: there are more or fewer bytes, or a bit beyond the last value is set.
    """
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(count, bits),):
        raise ArtifactError(
            f"{where} is {packed.dtype} {list(packed.shape)}; {count} values of {bits} bits take "
            f"{packed_bytes(count, bits)} bytes."
        )
    if bits > _BYTE:
        return packed[:count].long() | unpack(packed[count:], count, bits - _BYTE, where).long() << _BYTE
    values = torch.zeros(-(-count // _BYTE) * _BYTE, dtype=torch.uint8)
    for start in range(0, len(values) if bits else 0, CHUNK_ELEMENTS):
        some = values[start : start + CHUNK_ELEMENTS].view(-1, _BYTE)
        piece = packed[start // _BYTE * bits : (start // _BYTE + len(some)) * bits]
        eights = torch.zeros(len(some), _BYTE, dtype=torch.uint8)
        whole = len(piece) // bits
        eights[:whole, :bits] = piece[: whole * bits].view(-1, bits)
        eights[whole:, : len(piece) - whole * bits] = piece[whole * bits :]
        some.copy_((eights.view(torch.int64) >> _shifts(bits)) & ((1 << bits) - 1))
    if values[count:].any():
        raise ArtifactError(f"{where}: a bit beyond the last value is set.")
    return values[:count]


def level_dtype(most: int) -> torch.dtype:
    """The integers that hold levels 0 ... K outside of a message."""
    return torch.uint8 if most <= 255 else torch.uint16


def pack_levels(levels: torch.Tensor, most: int) -> torch.Tensor:
    """The levels K - |Σ sign| = 0 ... K of a conflict in ⌈log2(K + 1)⌉ bits each.

    Args:
        levels: Of any shape and integer type.
        most: K.

    Returns:
        [packed_bytes(n, bits)], uint8.

    Example:
        >>> pack_levels(torch.tensor([[4, 0], [3, 2]]), 4).tolist()
        [196, 4]
    """
    wide = levels.reshape(-1).to(torch.int32)
    if wide.numel() and not 0 <= int(wide.min()) <= int(wide.max()) <= most:
        raise AssertionError(f"levels lie between {int(wide.min())} and {int(wide.max())}, not in 0 ... {most}")
    return pack(wide, most.bit_length())


def unpack_levels(packed: torch.Tensor, shape: torch.Size, most: int, where: str) -> torch.Tensor:
    """The levels that `pack_levels` packed.

    Args:
        packed: The bytes.
        shape: Shape of the levels.
        most: K.
        where: What they are, for the error.

    Returns:
        The levels, in the type that carries them elsewhere (`level_dtype`).

    Raises:
        ArtifactError: there are more or fewer bytes, a level exceeds K, or a bit beyond the last value is set.
    """
    levels = unpack(packed, prod(shape), most.bit_length(), where)
    if levels.numel() and int(levels.max()) > most:
        raise ArtifactError(f"{where} holds the level {int(levels.max())}, the most is {most}.")
    return levels.to(level_dtype(most)).view(shape)
