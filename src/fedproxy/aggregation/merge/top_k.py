"""The k entries of largest magnitude of a long vector, exactly, in memory that does not grow with it.

The bits of |x|, read as an unsigned integer, order like |x| itself. So the k-th largest magnitude is found by radix
selection: a histogram of the leading 16 bits says in which bucket it lies, a histogram of the next 16 bits within that
bucket narrows it down, until all bits are known. That takes two walks over float32 (four over float64) and one
histogram a vector. Equal magnitudes are kept in the order of their index, lowest first.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from fedproxy.tensors import CHUNK_ELEMENTS, Span, Tensors, outlines, parameter_count, stacked

_DIGIT = 16
_ROUNDING = Fraction(1, 10**13)


@dataclass(frozen=True)
class Threshold:
    """What to keep of a vector: every magnitude above a limit, and the first few equal to it.

    Attributes:
        bits: The limit, as the bit pattern of a magnitude.
        ties: How many entries of exactly that magnitude are kept, counted from the lowest index.
    """

    bits: int
    ties: int


def kept_count(share: float, parameters: int) -> int:
    """floor(share · parameters), where a share that is short by 1e-13 of what gives a whole number counts as that.

    So neither the binary form of a share counts (0.29 of 100 is 29, though 0.29 * 100 is 28.999999999999996 in floats)
    nor the rounding of the arithmetic that made it (0.33333333333333326 of 12 is 4).
    """
    return min(parameters, math.floor((Fraction(share) + _ROUNDING) * parameters))


def magnitude_bits(values: torch.Tensor) -> torch.Tensor:
    """|x| as integers of the same order: float32 → int32, float64 → int64; values must not be NaN."""
    return values.abs().view(torch.int64 if values.dtype == torch.float64 else torch.int32)


def thresholds(
    vectors: Sequence[Tensors], keep: Sequence[int], chunk_elements: int = CHUNK_ELEMENTS
) -> list[Threshold | None]:
    """For each vector, the threshold that keeps exactly its `keep` largest magnitudes.

    Args:
        vectors: K mappings of one layout, of finite values.
        keep: How many entries to keep of each.
        chunk_elements: Values held at once.

    Returns:
        One threshold a vector; none where everything is kept.
    """
    total = parameter_count(vectors[0])
    wide = any(tensor.dtype == torch.float64 for tensor in outlines(vectors[0]).values())
    infinity = torch.tensor(math.inf, dtype=torch.float64 if wide else torch.float32)
    nothing = Threshold(int(magnitude_bits(infinity)), 0)
    result = [None if count >= total else nothing for count in keep]
    open_rows = [k for k, count in enumerate(keep) if 0 < count < total]
    if not open_rows:
        return result
    chosen = [vectors[k] for k in open_rows]
    prefix = [0] * len(chosen)
    wanted = [keep[k] for k in open_rows]
    for shift in range((64 if wide else 32) - _DIGIT, -1, -_DIGIT):
        counts = _histograms(chosen, prefix, shift, chunk_elements)
        for row, count in enumerate(counts):
            from_top = count.flip(0).cumsum(0)
            bucket = int(torch.searchsorted(from_top, wanted[row]))
            wanted[row] -= int(from_top[bucket - 1]) if bucket else 0
            prefix[row] = prefix[row] << _DIGIT | (len(count) - 1 - bucket)
    for row, k in enumerate(open_rows):
        result[k] = Threshold(prefix[row], wanted[row])
    return result


def _histograms(vectors: Sequence[Tensors], prefix: Sequence[int], shift: int, chunk_elements: int) -> torch.Tensor:
    """For each vector, the histogram of the digit at `shift` over the entries with this prefix: [K, 65536]."""
    device = next(iter(vectors[0].values())).device
    counts = torch.zeros(len(vectors), 1 << _DIGIT, dtype=torch.int64, device=device)
    for _, values in stacked(vectors, chunk_elements):
        for row, start in enumerate(prefix):
            digits = magnitude_bits(values[row]) >> shift
            digits = digits[digits >> _DIGIT == start]
            counts[row] += torch.bincount(digits & ((1 << _DIGIT) - 1), minlength=1 << _DIGIT)
    return counts.cpu()


def trimmed(
    vectors: Sequence[Tensors], limits: Sequence[Threshold | None], chunk_elements: int = CHUNK_ELEMENTS
) -> Iterator[tuple[list[Span], torch.Tensor]]:
    """Walk the vectors like `stacked`, with all that the thresholds do not keep set to zero."""
    left = [limit.ties if limit else 0 for limit in limits]
    for spans, values in stacked(vectors, chunk_elements):
        for row, limit in enumerate(limits):
            if limit is None:
                continue
            bits = magnitude_bits(values[row])
            tied = bits == limit.bits
            found = int(tied.sum())
            if found > left[row]:
                tied &= tied.cumsum(0) <= left[row]
            left[row] -= min(found, left[row])
            values[row].masked_fill_(~((bits > limit.bits) | tied), 0.0)
        yield spans, values
