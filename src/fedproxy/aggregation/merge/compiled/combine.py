# mypy: ignore-errors
"""The third walk: trim and merge."""

import numba
import numpy as np

from fedproxy.aggregation.analyse import BLOCK, SEGMENT
from fedproxy.aggregation.merge.compiled.blocks import (
    AHEAD,
    BF16,
    F32,
    MAGNITUDE,
    bits_of,
    block,
    compiled,
    pointer,
    tensor_at,
    value_of,
)

MEAN, TIES, H_TIES = 0, 1, 2
"""Rules that `combine` knows."""

_GROUP = 4


@compiled
def combine(rule, addresses, starts, formats, segment, limits, ties, weights, factors, rho, out):
    """Trim and merge one segment.

    Args:
        rule: `MEAN`, `TIES` or `H_TIES`.
        addresses: Table.
        starts: Table.
        formats: Table.
        segment: Which segment.
        limits: Magnitude bits from which a client's entry is kept, [K].
        ties: How many entries at the limit are kept in this segment, [K]; negative for all.
        weights: [K], float64.
        factors: [K], float64; each client's values are multiplied by it.
        rho: Of H-TIES.
        out: Addresses of the tensors that receive the merged values, [T], in the formats of the table.

    Returns:
        How many of these values are zero.
    """
    count = len(addresses)
    groups = (count + _GROUP - 1) // _GROUP
    tile = np.zeros((groups * _GROUP, BLOCK), np.float32)
    bits, sums = np.zeros(BLOCK, np.int32), np.zeros((_GROUP, BLOCK))
    w, f = np.zeros(groups * _GROUP), np.ones(groups * _GROUP)
    w[:count], f[:count] = weights, factors
    left, zeros = ties.copy(), 0
    ahead = max(AHEAD // count // BLOCK, 1) * BLOCK
    merged = np.zeros(BLOCK, np.float32)
    bits_at, tile_at, sums_at, merged_at = bits.ctypes.data, tile.ctypes.data, sums.ctypes.data, merged.ctypes.data
    end = min((segment + 1) * SEGMENT, starts[-1])
    for begin in range(segment * SEGMENT, end, BLOCK):
        width = min(BLOCK, end - begin)
        tensor = tensor_at(starts, begin)
        for k in range(count):
            source = block(addresses, k, starts, formats, tensor, begin, begin + width, ahead, bits_at)
            if left[k] < 0:
                _trim(source, np.int32(max(limits[k], 1)), tile_at + k * BLOCK * 4)
            else:
                left[k] -= _trim_ties(source, np.int32(limits[k]), left[k], tile_at + k * BLOCK * 4)
        sums[:] = 0.0
        if rule == MEAN:
            _mean(tile_at, groups, w, f, sums_at, merged_at)
        elif rule == TIES:
            _ties(tile_at, count, f, sums_at, merged_at)
        else:
            _h_ties(tile_at, groups, w, f, rho, sums_at, merged_at)
        zeros += _store(out, starts, formats, tensor, begin, begin + width, merged_at)
    return zeros


@compiled
def _store(addresses, starts, formats, tensor, begin, stop, values):
    """Write float32 from an address to begin ... stop in the format of each tensor; returns how many are zero then."""
    position, nonzero = begin, 0
    while position < stop:
        while starts[tensor + 1] <= position:
            tensor += 1
        count = min(stop, starts[tensor + 1]) - position
        offset = position - starts[tensor]
        bits = numba.carray(pointer(values + 4 * (position - begin)), count, np.int32)
        if formats[tensor] == F32:
            whole = numba.carray(pointer(addresses[tensor] + 4 * offset), count, np.int32)
            for i in range(count):
                whole[i] = bits[i]
                nonzero += (bits[i] & np.int32(MAGNITUDE)) != 0
        else:
            half = numba.carray(pointer(addresses[tensor] + 2 * offset), count, np.uint16)
            for i in range(count):
                short = _to_bf16(bits[i]) if formats[tensor] == BF16 else _to_f16(bits[i])
                half[i] = short
                nonzero += (short & 0x7FFF) != 0
        position += count
    return stop - begin - nonzero


@compiled
def _to_bf16(bits):
    """The bits of a finite float32 as those of the nearest bfloat16, the even one of two."""
    whole = np.int64(bits) & 0xFFFFFFFF
    return (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16


@compiled
def _to_f16(bits):
    """The bits of a finite float32 as those of the nearest float16, the even one of two; infinity beyond 65504."""
    magnitude, sign = np.int64(bits) & MAGNITUDE, (np.int64(bits) >> 16) & 0x8000
    if magnitude < 113 << 23:  # subnormal: a multiple of 2^-24, as the addition of 2^23 rounds it
        value = value_of(np.int32(magnitude)) * np.float32(2.0**24)
        return sign | (np.int64(bits_of(np.float32(value + np.float32(2.0**23)))) - (150 << 23))
    rest = magnitude - (112 << 23)
    return sign | min((rest + 0xFFF + ((rest >> 13) & 1)) >> 13, 0x7C00)


@compiled
def _trim(source, limit, target):
    """A block without the magnitudes below the limit, which is above zero: -0.0 goes too."""
    given = numba.carray(pointer(source), (BLOCK,), np.int32)
    bits = numba.carray(pointer(target), (BLOCK,), np.int32)
    for i in range(BLOCK):
        bits[i] = given[i] if (given[i] & np.int32(MAGNITUDE)) >= limit else np.int32(0)


@compiled
def _trim_ties(source, limit, most, target):
    """A block with the magnitudes above the limit and the first `most` at it; returns how many these are."""
    given = numba.carray(pointer(source), (BLOCK,), np.int32)
    bits = numba.carray(pointer(target), (BLOCK,), np.int32)
    taken = 0
    for i in range(BLOCK):
        magnitude = given[i] & np.int32(MAGNITUDE)
        tied = magnitude == limit and taken < most
        taken += tied
        bits[i] = given[i] if tied or magnitude > limit else np.int32(0)
    return taken


@compiled
def _mean(tile_at, groups, w, f, sums_at, merged_at):
    total = numba.carray(pointer(sums_at), (BLOCK,), np.float64)
    merged = numba.carray(pointer(merged_at), (BLOCK,), np.float32)
    for group in range(groups):
        rows = numba.carray(pointer(tile_at + group * _GROUP * BLOCK * 4), (_GROUP, BLOCK), np.float32)
        k = group * _GROUP
        w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
        f0, f1, f2, f3 = f[k], f[k + 1], f[k + 2], f[k + 3]
        for i in range(BLOCK):
            x = total[i] + w0 * (rows[0, i] * f0)
            x = x + w1 * (rows[1, i] * f1)
            x = x + w2 * (rows[2, i] * f2)
            total[i] = x + w3 * (rows[3, i] * f3)
    for i in range(BLOCK):
        merged[i] = total[i]


@compiled
def _ties(tile_at, count, f, sums_at, merged_at):
    sums = numba.carray(pointer(sums_at), (3, BLOCK), np.float64)
    merged = numba.carray(pointer(merged_at), (BLOCK,), np.float32)
    for k in range(count):
        row, factor = numba.carray(pointer(tile_at + k * BLOCK * 4), (BLOCK,), np.float32), f[k]
        for i in range(BLOCK):
            sums[0, i] += row[i] * factor
    for k in range(count):
        row, factor = numba.carray(pointer(tile_at + k * BLOCK * 4), (BLOCK,), np.float32), f[k]
        for i in range(BLOCK):
            value, total, kept, agreeing = row[i] * factor, sums[0, i], sums[1, i], sums[2, i]
            same = ((value > 0) & (total > 0)) | ((value < 0) & (total < 0))
            sums[1, i] = kept + value if same else kept
            sums[2, i] = agreeing + 1.0 if same else agreeing
    for i in range(BLOCK):
        merged[i] = sums[1, i] / max(sums[2, i], 1.0)


@compiled
def _h_ties(tile_at, groups, w, f, rho, sums_at, merged_at):
    sums = numba.carray(pointer(sums_at), (4, BLOCK), np.float64)
    merged = numba.carray(pointer(merged_at), (BLOCK,), np.float32)
    for group in range(groups):
        rows = numba.carray(pointer(tile_at + group * _GROUP * BLOCK * 4), (_GROUP, BLOCK), np.float32)
        bits = numba.carray(pointer(tile_at + group * _GROUP * BLOCK * 4), (_GROUP, BLOCK), np.int32)
        k = group * _GROUP
        w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
        f0, f1, f2, f3 = f[k], f[k + 1], f[k + 2], f[k + 3]
        for i in range(BLOCK):
            u0, u1, u2, u3 = bits[0, i] > 0, bits[1, i] > 0, bits[2, i] > 0, bits[3, i] > 0
            d0, d1, d2, d3 = bits[0, i] < 0, bits[1, i] < 0, bits[2, i] < 0, bits[3, i] < 0
            x0, x1, x2, x3 = rows[0, i] * f0, rows[1, i] * f1, rows[2, i] * f2, rows[3, i] * f3
            m0, m1, m2, m3 = w0 * x0, w1 * x1, w2 * x2, w3 * x3
            p, n, up, down = sums[0, i], sums[1, i], sums[2, i], sums[3, i]
            p = p + m0 if u0 else p
            p = p + m1 if u1 else p
            p = p + m2 if u2 else p
            sums[0, i] = p + m3 if u3 else p
            n = n - m0 if d0 else n
            n = n - m1 if d1 else n
            n = n - m2 if d2 else n
            sums[1, i] = n - m3 if d3 else n
            up = up + w0 if u0 else up
            up = up + w1 if u1 else up
            up = up + w2 if u2 else up
            sums[2, i] = up + w3 if u3 else up
            down = down + w0 if d0 else down
            down = down + w1 if d1 else down
            down = down + w2 if d2 else down
            sums[3, i] = down + w3 if d3 else down
    for i in range(BLOCK):
        p, n, up, down = sums[0, i], sums[1, i], sums[2, i], sums[3, i]
        positive = (p >= rho * n) & (p > 0)
        negative = (n >= rho * p) & (n > 0)
        mass = p if positive else (-n if negative else 0.0)
        weight = up if positive else (down if negative else 1.0)
        merged[i] = mass / weight
