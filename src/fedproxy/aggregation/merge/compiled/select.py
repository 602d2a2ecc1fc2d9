# mypy: ignore-errors
"""The second walk: what each client keeps."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fedproxy.aggregation.analyse import BLOCK, SEGMENT
from fedproxy.aggregation.merge.compiled.blocks import AHEAD, MAGNITUDE, block, compiled, tensor_at


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
            ir.FunctionType(vector, [vector, mask, vector]),
            f"llvm.experimental.vector.compress.v{width}i32",
        )

        def spread(value: Any) -> Any:
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), builder.trunc(value, number), number(0))
            return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(vector, [0] * width))

        lowest, highest = spread(arguments[1]), spread(arguments[2])
        zeros, magnitude_mask = ir.Constant(vector, [0] * width), ir.Constant(vector, [MAGNITUDE] * width)
        before, loop = builder.block, builder.append_basic_block("bracket")
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
        at = builder.bitcast(builder.gep(target, [taken]), vector.as_pointer())
        builder.store(builder.call(compress, [magnitudes, within, ir.Constant(vector, ir.Undefined)]), at, align=4)
        number_within = builder.ctpop(builder.bitcast(within, ir.IntType(width)))
        now = builder.add(taken, builder.zext(number_within, index))
        onward = builder.add(place, index(width))
        for value, first, later in (
            (place, index(0), onward),
            (taken, index(0), now),
            (below, zeros, more_below),
            (equal, zeros, more_equal),
        ):
            value.add_incoming(first, before)
            value.add_incoming(later, loop)
        after = builder.append_basic_block("bracketed")
        builder.cbranch(builder.icmp_signed("<", onward, index(BLOCK)), loop, after)
        builder.position_at_end(after)
        totals = builder.inttoptr(arguments[3], vector.as_pointer())
        for position, total in enumerate((more_below, more_equal)):
            at = builder.gep(totals, [index(position)])
            builder.store(builder.add(builder.load(at, align=4), total), at, align=4)
        return now

    return types.intp(*[types.intp] * 5), generate


@compiled
def sample(addresses, k, starts, formats, step, run, magnitudes):
    """Magnitudes of one client at runs of `run` neighbours every `step` coordinates; returns how many.

    The tables are as of `bracket`.
    """
    bits, taken = np.zeros(BLOCK, np.int32), 0
    for begin in range(0, starts[-1], step):
        stop = min(begin + run, starts[-1])
        block(addresses, k, starts, formats, tensor_at(starts, begin), begin, stop, step, bits.ctypes.data)
        for i in range(stop - begin):
            magnitudes[taken] = bits[i] & MAGNITUDE
            taken += 1
    return taken


@compiled
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
    bits_at, counts_at, found_at = bits.ctypes.data, counts.ctypes.data, found.ctypes.data
    end = min((segment + 1) * SEGMENT, starts[-1])
    taken = 0
    offsets[0] = 0
    for k in range(len(addresses)):
        counts[:] = 0
        overfull = False
        tensor = tensor_at(starts, segment * SEGMENT)
        for begin in range(segment * SEGMENT, end, BLOCK):
            if taken + BLOCK > offsets[k] + room:
                taken, overfull = offsets[k], True
                break
            while starts[tensor + 1] <= begin:
                tensor += 1
            width = min(BLOCK, end - begin)
            if width < BLOCK:
                bits[width:] = MAGNITUDE
            source = block(addresses, k, starts, formats, tensor, begin, begin + width, AHEAD, bits_at)
            taken += _collect(source, low[k], high[k], counts_at, found_at + 4 * taken)
        below[k], equal[k], offsets[k + 1] = counts[0].sum(), -1 if overfull else counts[1].sum(), taken
