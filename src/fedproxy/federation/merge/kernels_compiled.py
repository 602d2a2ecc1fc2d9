# mypy: ignore-errors
"""The compiled loops of `kernels`: one call works on one stretch of the long vector, without Python's lock.

Every function takes a table of where the updates' values lie: `addresses` [K, T] of the T tensors of each client,
`starts` [T + 1] of the tensors in the long vector, and `formats` [T] of their values. Values pass through tiles of
`BLOCK` coordinates that stay in cache. No loop changes the order of a floating-point sum, so the results are those of
the torch path, bit for bit: only sums of exact products may be contracted to fused multiply-adds, which rounds alike.

Types are those that the compiler infers, so none are written at the compiled functions.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fedproxy.federation.analyse import BLOCK, LANES, SEGMENT

F32, BF16, F16 = 0, 1, 2
"""Formats of values in the table."""

MEAN, TIES, H_TIES = 0, 1, 2
"""Rules that `combine` knows."""

_GROUP = 4
_LOWEST = -(1 << 31)
_MAGNITUDE = (1 << 31) - 1

Function = TypeVar("Function", bound=Callable[..., Any])


def _compiled(function: Function) -> Function:
    """Compile on first use without Python's lock, and keep the code on disk where there is a place for it."""
    try:
        return cast(Function, numba.njit(nogil=True, error_model="numpy", cache=True)(function))
    except RuntimeError:  # no directory to write to
        return cast(Function, numba.njit(nogil=True, error_model="numpy")(function))


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """An integer address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@intrinsic
def _add_products(typing: Any, left: Any, right: Any, sums: Any) -> Any:
    """Add the products of 4 rows with 4 rows of a tile to 16 rows of lane sums.

    Each row at the addresses `left` and `right` holds `BLOCK` float64. Lane l of a pair sums its products at
    l, l + LANES, ... in this order, starting from zero; the result is added to `sums`, [4, 4, LANES].
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, index = ir.VectorType(ir.DoubleType(), LANES), ir.IntType(64)
        bases = [builder.inttoptr(argument, ir.DoubleType().as_pointer()) for argument in arguments]

        def at(base: Any, offset: Any) -> Any:
            return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

        before, loop = builder.block, builder.append_basic_block("products")
        builder.branch(loop)
        builder.position_at_end(loop)
        place = builder.phi(index)
        running = [builder.phi(vector) for _ in range(_GROUP * _GROUP)]
        rows = [
            [builder.load(at(base, builder.add(place, index(row * BLOCK))), align=8) for row in range(_GROUP)]
            for base in bases[:2]
        ]
        added = []
        for position, partial in enumerate(running):
            product = builder.fmul(rows[0][position // _GROUP], rows[1][position % _GROUP], flags=("contract",))
            added.append(builder.fadd(partial, product, flags=("contract",)))
        following = builder.add(place, index(LANES))
        place.add_incoming(index(0), before)
        place.add_incoming(following, loop)
        for partial, total in zip(running, added, strict=True):
            partial.add_incoming(ir.Constant(vector, [0.0] * LANES), before)
            partial.add_incoming(total, loop)
        after = builder.append_basic_block("summed")
        builder.cbranch(builder.icmp_signed("<", following, index(BLOCK)), loop, after)
        builder.position_at_end(after)
        for position, total in enumerate(added):
            target = at(bases[2], index(position * LANES))
            builder.store(builder.fadd(builder.load(target, align=8), total), target, align=8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def _collect(typing: Any, bits: Any, low: Any, high: Any, counts: Any, found: Any) -> Any:
    """Bracket the magnitudes of a block of float32 bits.

    Args:
        typing: Not used.
        bits: Address of `BLOCK` int32.
        low: Magnitude bits.
        high: Magnitude bits.
        counts: Address of [2, 16] int32, to which the numbers of magnitudes below and at `low` are added, by lane.
        found: Address that receives the magnitudes above `low` and up to `high`, in order, int32.

    Returns:
        How many were found.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        width, index, number = 16, ir.IntType(64), ir.IntType(32)
        vector, mask = ir.VectorType(number, width), ir.VectorType(ir.IntType(1), width)
        source, target = (builder.inttoptr(arguments[i], number.as_pointer()) for i in (0, 4))
        compress = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [vector, number.as_pointer(), mask]),
            f"llvm.masked.compressstore.v{width}i32",
        )

        def spread(value: Any) -> Any:
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), builder.trunc(value, number), number(0))
            return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(vector, [0] * width))

        lowest, highest = spread(arguments[1]), spread(arguments[2])
        zeros, magnitude_mask = ir.Constant(vector, [0] * width), ir.Constant(vector, [_MAGNITUDE] * width)
        before, loop = builder.block, builder.append_basic_block("bracket")
        some, following = builder.append_basic_block("some"), builder.append_basic_block("following")
        builder.branch(loop)
        builder.position_at_end(loop)
        place, taken = builder.phi(index), builder.phi(index)
        below, equal = builder.phi(vector), builder.phi(vector)
        loaded = builder.load(builder.bitcast(builder.gep(source, [place]), vector.as_pointer()), align=4)
        magnitudes = builder.and_(loaded, magnitude_mask)
        more_below = builder.sub(below, builder.sext(builder.icmp_signed("<", magnitudes, lowest), vector))
        more_equal = builder.sub(equal, builder.sext(builder.icmp_signed("==", magnitudes, lowest), vector))
        above = builder.icmp_signed(">", magnitudes, lowest)
        within = builder.and_(above, builder.icmp_signed("<=", magnitudes, highest))
        packed = builder.bitcast(within, ir.IntType(width))
        builder.cbranch(builder.icmp_unsigned("!=", packed, ir.IntType(width)(0)), some, following)
        builder.position_at_end(some)
        builder.call(compress, [magnitudes, builder.gep(target, [taken]), within])
        more = builder.add(taken, builder.zext(builder.ctpop(packed), index))
        builder.branch(following)
        builder.position_at_end(following)
        now = builder.phi(index)
        now.add_incoming(taken, loop)
        now.add_incoming(more, some)
        onward = builder.add(place, index(width))
        for value, first, later in (
            (place, index(0), onward),
            (taken, index(0), now),
            (below, zeros, more_below),
            (equal, zeros, more_equal),
        ):
            value.add_incoming(first, before)
            value.add_incoming(later, following)
        after = builder.append_basic_block("bracketed")
        builder.cbranch(builder.icmp_signed("<", onward, index(BLOCK)), loop, after)
        builder.position_at_end(after)
        totals = builder.inttoptr(arguments[3], vector.as_pointer())
        for position, total in enumerate((more_below, more_equal)):
            at = builder.gep(totals, [index(position)])
            builder.store(builder.add(builder.load(at, align=4), total), at, align=4)
        return now

    return types.intp(*[types.intp] * 5), generate


@intrinsic
def _bits_of(typing: Any, value: Any) -> Any:
    """The bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def _value_of(typing: Any, bits: Any) -> Any:
    """The float32 of the given bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@_compiled
def _block(addresses, starts, formats, tensor, begin, stop, scratch):
    """One client's values begin ... stop as float32 bits, in place where they lie so, else in `scratch`.

    Args:
        addresses: Table of the client, [T].
        starts: Table.
        formats: Table.
        tensor: The tensor that holds the first value.
        begin: First coordinate.
        stop: The one after the last, at most `BLOCK` later.
        scratch: [BLOCK], int32; what the values leave of it is not changed.

    Returns:
        The address of `BLOCK` int32.
    """
    if formats[tensor] == F32 and stop - begin == BLOCK and stop <= starts[tensor + 1]:
        return addresses[tensor] + 4 * (begin - starts[tensor])
    position = begin
    while position < stop:
        while starts[tensor + 1] <= position:
            tensor += 1
        count = min(stop, starts[tensor + 1]) - position
        offset = position - starts[tensor]
        target = scratch.ctypes.data + 4 * (position - begin)
        bits = numba.carray(_pointer(target), count, np.int32)
        if formats[tensor] == F32:
            whole = numba.carray(_pointer(addresses[tensor] + 4 * offset), count, np.int32)
            for i in range(count):
                bits[i] = whole[i]
        else:
            half = numba.carray(_pointer(addresses[tensor] + 2 * offset), count, np.uint16)
            if formats[tensor] == BF16:
                for i in range(count):
                    bits[i] = np.int32(np.uint32(half[i]) << np.uint32(16))
            else:
                for i in range(count):
                    bits[i] = _from_f16(half[i])
        position += count
    return scratch.ctypes.data


@_compiled
def _from_f16(half):
    """The bits of a float16 as those of the float32 of the same value."""
    magnitude = np.int32(half & np.uint16(0x7FFF))
    small = _bits_of(np.float32(magnitude) * np.float32(2.0**-24))
    shift = np.int32(112 << 23) if magnitude < 0x7C00 else np.int32(224 << 23)
    wide = small if magnitude < 0x400 else np.int32((magnitude << 13) + shift)
    return np.int32(wide | np.int32(np.uint32(half & np.uint16(0x8000)) << np.uint32(16)))


@_compiled
def _first(starts, position):
    return np.searchsorted(starts, position, side="right") - 1


@_compiled
def _widen(bits_at, wide_at, signs_at):
    """A block of float32 bits as float64, and its signs added; shapes known to the compiler make it vector code."""
    bits = numba.carray(_pointer(bits_at), (BLOCK,), np.int32)
    values = numba.carray(_pointer(bits_at), (BLOCK,), np.float32)
    wide = numba.carray(_pointer(wide_at), (BLOCK,), np.float64)
    signs = numba.carray(_pointer(signs_at), (BLOCK,), np.int32)
    for i in range(BLOCK):
        signs[i] += np.int32(bits[i] > 0) - np.int32((bits[i] < 0) & (bits[i] != _LOWEST))
    for i in range(BLOCK):
        wide[i] = values[i]


@_compiled
def _on_a_line(count):
    """Zeros, float64, that begin on a cache line: a vector of `LANES` never lies across two."""
    room = np.zeros(count + LANES)
    first = (-room.ctypes.data % (8 * LANES)) // 8
    return room[first : first + count]


@_compiled
def measure(addresses, starts, formats, segments, gram, histogram, levels):
    """Dot products and sign disagreement of some segments.

    Args:
        addresses: Table.
        starts: Table.
        formats: Table.
        segments: First segment and the one after the last.
        gram: Receives the dot products of each segment, [segments, K, K], float64.
        histogram: Receives the number of coordinates by K - |sum of signs|, [K + 1], added.
        levels: Receives K - |sum of signs| of each coordinate of the whole vector, or is empty.
    """
    count = len(addresses)
    groups = (count + _GROUP - 1) // _GROUP
    tile = _on_a_line(groups * _GROUP * BLOCK).reshape((groups * _GROUP, BLOCK))
    lanes = _on_a_line((groups * _GROUP) ** 2 * LANES).reshape((groups, groups, _GROUP, _GROUP, LANES))
    bits = np.zeros(BLOCK, np.int32)
    signs = np.zeros(BLOCK, np.int32)
    counts = np.zeros((4, count + 1), np.int64)
    row_bytes, pair_bytes = _GROUP * BLOCK * 8, _GROUP * _GROUP * LANES * 8
    for segment in range(segments[0], segments[1]):
        lanes[:] = 0.0
        for begin in range(segment * SEGMENT, min((segment + 1) * SEGMENT, starts[-1]), BLOCK):
            width = min(BLOCK, starts[-1] - begin)
            tensor = _first(starts, begin)
            signs[:] = 0
            bits[width:] = 0
            for k in range(count):
                source = _block(addresses[k], starts, formats, tensor, begin, begin + width, bits)
                _widen(source, tile[k].ctypes.data, signs.ctypes.data)
            for i in range(groups):
                for j in range(i, groups):
                    _add_products(
                        tile.ctypes.data + i * row_bytes,
                        tile.ctypes.data + j * row_bytes,
                        lanes.ctypes.data + (i * groups + j) * pair_bytes,
                    )
            if count == 1:
                signs[:] = 1
            for i in range(width):
                signs[i] = count - abs(signs[i])
            for i in range(width):
                counts[i & 3, signs[i]] += 1
            if len(levels) > 0:
                for i in range(width):
                    levels[begin + i] = signs[i]
        for i in range(count):
            for j in range(i, count):
                v = lanes[i // _GROUP, j // _GROUP, i % _GROUP, j % _GROUP]
                total = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
                gram[segment - segments[0], i, j] = total
                gram[segment - segments[0], j, i] = total
    for level in range(count + 1):
        histogram[level] += counts[:, level].sum()


@_compiled
def sample(addresses, starts, formats, step, run, magnitudes):
    """Magnitudes of one client at runs of `run` neighbours every `step` coordinates; returns how many."""
    bits, taken = np.zeros(BLOCK, np.int32), 0
    for begin in range(0, starts[-1], step):
        stop = min(begin + run, starts[-1])
        _block(addresses, starts, formats, _first(starts, begin), begin, stop, bits)
        for i in range(stop - begin):
            magnitudes[taken] = bits[i] & _MAGNITUDE
            taken += 1
    return taken


@_compiled
def bracket(addresses, starts, formats, segment, low, high, below, equal, found, offsets, room):
    """Count one segment's magnitudes below and at `low`, and collect those above it and up to `high`.

    Args:
        addresses: Table of the chosen clients.
        starts: Table.
        formats: Table.
        segment: Which segment.
        low: Magnitude bits, [K].
        high: Magnitude bits, [K].
        below: Receives the numbers below `low`, [K].
        equal: Receives the numbers at `low`, [K].
        found: Receives the magnitudes in between, client by client, each in order of its coordinates.
        offsets: Receives where each client's begin and end in `found`, [K + 1].
        room: How many may be found of a client; one that has more is left out, with -1 as its number at `low`.
    """
    bits = np.zeros(BLOCK, np.int32)
    counts = np.zeros((2, 16), np.int32)
    end = min((segment + 1) * SEGMENT, starts[-1])
    taken = 0
    offsets[0] = 0
    for k in range(len(addresses)):
        counts[:] = 0
        overfull = False
        tensor = _first(starts, segment * SEGMENT)
        for begin in range(segment * SEGMENT, end, BLOCK):
            if taken + BLOCK > offsets[k] + room:
                taken, overfull = offsets[k], True
                break
            while starts[tensor + 1] <= begin:
                tensor += 1
            width = min(BLOCK, end - begin)
            bits[width:] = _MAGNITUDE
            source = _block(addresses[k], starts, formats, tensor, begin, begin + width, bits)
            taken += _collect(source, low[k], high[k], counts.ctypes.data, found.ctypes.data + 4 * taken)
        below[k], equal[k], offsets[k + 1] = counts[0].sum(), -1 if overfull else counts[1].sum(), taken


@_compiled
def count_equal(addresses, starts, formats, segment, limits, equal):
    """Count one segment's magnitudes of exactly the bits `limits`, [K], into `equal`, [K]."""
    bits = np.zeros(BLOCK, np.int32)
    end = min((segment + 1) * SEGMENT, starts[-1])
    for k in range(len(addresses)):
        limit = np.int32(limits[k])
        equal[k] = 0
        for begin in range(segment * SEGMENT, end, BLOCK):
            width = min(BLOCK, end - begin)
            source = _block(addresses[k], starts, formats, _first(starts, begin), begin, begin + width, bits)
            values = numba.carray(_pointer(source), width, np.int32)
            for i in range(width):
                equal[k] += (values[i] & np.int32(_MAGNITUDE)) == limit


@_compiled
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
    merged = np.zeros(BLOCK, np.float32)
    end = min((segment + 1) * SEGMENT, starts[-1])
    for begin in range(segment * SEGMENT, end, BLOCK):
        width = min(BLOCK, end - begin)
        tensor = _first(starts, begin)
        for k in range(count):
            source = _block(addresses[k], starts, formats, tensor, begin, begin + width, bits)
            if left[k] < 0:
                _trim(source, np.int32(limits[k]), tile[k].ctypes.data)
            else:
                left[k] -= _trim_ties(source, np.int32(limits[k]), left[k], tile[k].ctypes.data)
        sums[:] = 0.0
        if rule == MEAN:
            _mean(tile.ctypes.data, groups, w, f, sums.ctypes.data, merged.ctypes.data)
        elif rule == TIES:
            _ties(tile.ctypes.data, count, f, sums.ctypes.data, merged.ctypes.data)
        else:
            _h_ties(tile.ctypes.data, groups, w, f, rho, sums.ctypes.data, merged.ctypes.data)
        zeros += _store(out, starts, formats, tensor, begin, begin + width, merged)
    return zeros


@_compiled
def _store(addresses, starts, formats, tensor, begin, stop, values):
    """Write float32 values to begin ... stop in the format of each tensor; returns how many are zero then."""
    position, nonzero = begin, 0
    while position < stop:
        while starts[tensor + 1] <= position:
            tensor += 1
        count = min(stop, starts[tensor + 1]) - position
        offset = position - starts[tensor]
        bits = numba.carray(_pointer(values.ctypes.data + 4 * (position - begin)), count, np.int32)
        if formats[tensor] == F32:
            whole = numba.carray(_pointer(addresses[tensor] + 4 * offset), count, np.int32)
            for i in range(count):
                whole[i] = bits[i]
                nonzero += (bits[i] & np.int32(_MAGNITUDE)) != 0
        else:
            half = numba.carray(_pointer(addresses[tensor] + 2 * offset), count, np.uint16)
            for i in range(count):
                short = _to_bf16(bits[i]) if formats[tensor] == BF16 else _to_f16(bits[i])
                half[i] = short
                nonzero += (short & 0x7FFF) != 0
        position += count
    return stop - begin - nonzero


@_compiled
def _to_bf16(bits):
    """The bits of a finite float32 as those of the nearest bfloat16, the even one of two."""
    whole = np.int64(bits) & 0xFFFFFFFF
    return (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16


@_compiled
def _to_f16(bits):
    """The bits of a finite float32 as those of the nearest float16, the even one of two; infinity beyond 65504."""
    magnitude, sign = np.int64(bits) & _MAGNITUDE, (np.int64(bits) >> 16) & 0x8000
    if magnitude < 113 << 23:  # subnormal: a multiple of 2^-24, as the addition of 2^23 rounds it
        value = _value_of(np.int32(magnitude)) * np.float32(2.0**24)
        return sign | (np.int64(_bits_of(np.float32(value + np.float32(2.0**23)))) - (150 << 23))
    rest = magnitude - (112 << 23)
    return sign | min((rest + 0xFFF + ((rest >> 13) & 1)) >> 13, 0x7C00)


@_compiled
def _trim(source, limit, target):
    """A block without the magnitudes below the limit."""
    given = numba.carray(_pointer(source), (BLOCK,), np.int32)
    bits = numba.carray(_pointer(target), (BLOCK,), np.int32)
    for i in range(BLOCK):
        bits[i] = given[i] if (given[i] & np.int32(_MAGNITUDE)) >= limit else np.int32(0)


@_compiled
def _trim_ties(source, limit, most, target):
    """A block with the magnitudes above the limit and the first `most` at it; returns how many these are."""
    given = numba.carray(_pointer(source), (BLOCK,), np.int32)
    bits = numba.carray(_pointer(target), (BLOCK,), np.int32)
    taken = 0
    for i in range(BLOCK):
        magnitude = given[i] & np.int32(_MAGNITUDE)
        tied = magnitude == limit and taken < most
        taken += tied
        bits[i] = given[i] if tied or magnitude > limit else np.int32(0)
    return taken


@_compiled
def _mean(tile_at, groups, w, f, sums_at, merged_at):
    total = numba.carray(_pointer(sums_at), (BLOCK,), np.float64)
    merged = numba.carray(_pointer(merged_at), (BLOCK,), np.float32)
    for group in range(groups):
        rows = numba.carray(_pointer(tile_at + group * _GROUP * BLOCK * 4), (_GROUP, BLOCK), np.float32)
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


@_compiled
def _ties(tile_at, count, f, sums_at, merged_at):
    sums = numba.carray(_pointer(sums_at), (3, BLOCK), np.float64)
    merged = numba.carray(_pointer(merged_at), (BLOCK,), np.float32)
    for k in range(count):
        row, factor = numba.carray(_pointer(tile_at + k * BLOCK * 4), (BLOCK,), np.float32), f[k]
        for i in range(BLOCK):
            sums[0, i] += row[i] * factor
    for k in range(count):
        row, factor = numba.carray(_pointer(tile_at + k * BLOCK * 4), (BLOCK,), np.float32), f[k]
        for i in range(BLOCK):
            value, total, kept, agreeing = row[i] * factor, sums[0, i], sums[1, i], sums[2, i]
            same = ((value > 0) & (total > 0)) | ((value < 0) & (total < 0))
            sums[1, i] = kept + value if same else kept
            sums[2, i] = agreeing + 1.0 if same else agreeing
    for i in range(BLOCK):
        merged[i] = sums[1, i] / max(sums[2, i], 1.0)


@_compiled
def _h_ties(tile_at, groups, w, f, rho, sums_at, merged_at):
    sums = numba.carray(_pointer(sums_at), (4, BLOCK), np.float64)
    merged = numba.carray(_pointer(merged_at), (BLOCK,), np.float32)
    for group in range(groups):
        rows = numba.carray(_pointer(tile_at + group * _GROUP * BLOCK * 4), (_GROUP, BLOCK), np.float32)
        k = group * _GROUP
        w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
        f0, f1, f2, f3 = f[k], f[k + 1], f[k + 2], f[k + 3]
        for i in range(BLOCK):
            x0, x1, x2, x3 = rows[0, i] * f0, rows[1, i] * f1, rows[2, i] * f2, rows[3, i] * f3
            m0, m1, m2, m3 = w0 * x0, w1 * x1, w2 * x2, w3 * x3
            p, n, up, down = sums[0, i], sums[1, i], sums[2, i], sums[3, i]
            p = p + (m0 if m0 > 0 else 0.0)
            p = p + (m1 if m1 > 0 else 0.0)
            p = p + (m2 if m2 > 0 else 0.0)
            sums[0, i] = p + (m3 if m3 > 0 else 0.0)
            n = n - (m0 if m0 < 0 else 0.0)
            n = n - (m1 if m1 < 0 else 0.0)
            n = n - (m2 if m2 < 0 else 0.0)
            sums[1, i] = n - (m3 if m3 < 0 else 0.0)
            up = up + w0 if x0 > 0 else up
            up = up + w1 if x1 > 0 else up
            up = up + w2 if x2 > 0 else up
            sums[2, i] = up + w3 if x3 > 0 else up
            down = down + w0 if x0 < 0 else down
            down = down + w1 if x1 < 0 else down
            down = down + w2 if x2 < 0 else down
            sums[3, i] = down + w3 if x3 < 0 else down
    for i in range(BLOCK):
        p, n, up, down = sums[0, i], sums[1, i], sums[2, i], sums[3, i]
        positive = (p >= rho * n) & (p > 0)
        negative = (n >= rho * p) & (n > 0)
        mass = p if positive else (-n if negative else 0.0)
        weight = up if positive else (down if negative else 1.0)
        merged[i] = mass / weight
