# mypy: ignore-errors
"""The first walk: dot products and sign disagreement."""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from fedproxy.aggregation.analyse import BLOCK, LANES, SEGMENT
from fedproxy.aggregation.merge.compiled.blocks import AHEAD, LOWEST, block, compiled, pointer, tensor_at

_GROUP = 4
_FEW = 16
"""Up to so many levels are counted one after the other, without a table."""


def _products(builder: Any, arguments: Any, pairs: Any) -> None:
    """Emit the loop that adds the products of pairs of rows, each `BLOCK` float32, to rows of lane sums.

    Lane l of a pair sums its products in float64 at l, l + LANES, ... in this order, starting from zero; the result is
    added to the sums of the pair.

    Args:
        builder: Of the function.
        arguments: Addresses of the rows on the left, of those on the right, and of the sums, [4, 4, LANES] float64.
        pairs: Numbers (left, right) of the rows.
    """
    vector, narrow, index = ir.VectorType(ir.DoubleType(), LANES), ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)
    left, right = (builder.inttoptr(argument, ir.FloatType().as_pointer()) for argument in arguments[:2])
    sums = builder.inttoptr(arguments[2], vector.as_pointer())

    def values(base: Any, number: int) -> Any:
        at = builder.gep(base, [builder.add(place, index(number * BLOCK))])
        return builder.fpext(builder.load(builder.bitcast(at, narrow.as_pointer()), align=4 * LANES), vector)

    before, loop = builder.block, builder.append_basic_block("products")
    builder.branch(loop)
    builder.position_at_end(loop)
    place = builder.phi(index)
    running = [builder.phi(vector) for _ in pairs]
    lefts, rights = ([values(base, number) for number in range(_GROUP)] for base in (left, right))
    added = []
    for (i, j), partial in zip(pairs, running, strict=True):
        product = builder.fmul(lefts[i], rights[j], flags=("contract",))
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
    for (i, j), total in zip(pairs, added, strict=True):
        at = builder.gep(sums, [index(i * _GROUP + j)])
        builder.store(builder.fadd(builder.load(at, align=8 * LANES), total), at, align=8 * LANES)


@intrinsic
def _add_products(typing: Any, left: Any, right: Any, sums: Any) -> Any:
    """Add the products of 4 rows with 4 others, see `_products`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _products(builder, arguments, [(i, j) for i in range(_GROUP) for j in range(_GROUP)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def _add_own_products(typing: Any, rows: Any, sums: Any) -> Any:
    """Add the products of 4 rows with themselves and each with those after it, see `_products`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, sums = arguments
        _products(builder, (rows, rows, sums), [(i, j) for i in range(_GROUP) for j in range(i, _GROUP)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@compiled
def _take(bits_at, row_at, signs_at):
    """Copy a block of float32 bits and add its signs; shapes known to the compiler make it vector code."""
    bits = numba.carray(pointer(bits_at), (BLOCK,), np.int32)
    row = numba.carray(pointer(row_at), (BLOCK,), np.int32)
    signs = numba.carray(pointer(signs_at), (BLOCK,), np.int32)
    for i in range(BLOCK):
        row[i] = bits[i]
        signs[i] += np.int32(bits[i] > 0) - np.int32((bits[i] < 0) & (bits[i] != LOWEST))


@compiled
def _on_a_line(count):
    """Zeros, float64, that begin on a cache line: a vector of `LANES` never lies across two."""
    room = np.zeros(count + LANES)
    first = (-room.ctypes.data % (8 * LANES)) // 8
    return room[first : first + count]


@compiled
def _count(levels_at, width, counts):
    """Add the number of coordinates of each level, among `width` of a block, to `counts`, [4, K + 1]."""
    levels = numba.carray(pointer(levels_at), (BLOCK,), np.int32)
    if counts.shape[1] > _FEW:
        for i in range(width):
            counts[i & 3, levels[i]] += 1
        return
    for i in range(width, BLOCK):
        levels[i] = -1
    for level in range(counts.shape[1]):
        found = np.int32(0)
        for i in range(BLOCK):
            found = np.int32(found + (levels[i] == np.int32(level)))
        counts[0, level] += found


@compiled
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
    tile = _on_a_line(groups * _GROUP * BLOCK // 2).view(np.float32).reshape((groups * _GROUP, BLOCK))
    lanes = _on_a_line((groups * _GROUP) ** 2 * LANES).reshape((groups, groups, _GROUP, _GROUP, LANES))
    bits = np.zeros(BLOCK, np.int32)
    signs = np.zeros(BLOCK, np.int32)
    counts = np.zeros((4, count + 1), np.int64)
    tile_at, lanes_at, bits_at, signs_at = (
        tile.ctypes.data,
        lanes.ctypes.data,
        bits.ctypes.data,
        signs.ctypes.data,
    )
    ahead = max(AHEAD // count // BLOCK, 1) * BLOCK
    row_bytes, pair_bytes = _GROUP * BLOCK * 4, _GROUP * _GROUP * LANES * 8
    for segment in range(segments[0], segments[1]):
        lanes[:] = 0.0
        for begin in range(segment * SEGMENT, min((segment + 1) * SEGMENT, starts[-1]), BLOCK):
            width = min(BLOCK, starts[-1] - begin)
            tensor = tensor_at(starts, begin)
            signs[:] = 0
            if width < BLOCK:
                bits[width:] = 0
            for k in range(count):
                source = block(addresses, k, starts, formats, tensor, begin, begin + width, ahead, bits_at)
                _take(source, tile_at + k * BLOCK * 4, signs_at)
            for i in range(groups):
                rows, sums = tile_at + i * row_bytes, lanes_at + i * groups * pair_bytes
                _add_own_products(rows, sums + i * pair_bytes)
                for j in range(i + 1, groups):
                    _add_products(rows, tile_at + j * row_bytes, sums + j * pair_bytes)
            if count == 1:
                signs[:] = 1
            for i in range(BLOCK):
                signs[i] = count - abs(signs[i])
            if len(levels) > 0:
                for i in range(width):
                    levels[begin + i] = signs[i]
            _count(signs_at, width, counts)
        for i in range(count):
            for j in range(i, count):
                v = lanes[i // _GROUP, j // _GROUP, i % _GROUP, j % _GROUP]
                total = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
                gram[segment - segments[0], i, j] = total
                gram[segment - segments[0], j, i] = total
    for level in range(count + 1):
        histogram[level] += counts[:, level].sum()
