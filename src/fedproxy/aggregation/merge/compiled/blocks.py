# mypy: ignore-errors
"""Reading the updates block by block, whatever their format.

Every function takes a table of where the updates' values lie: `addresses` [K, T] of the T tensors of each client,
`starts` [T + 1] of the tensors in the long vector, and `formats` [T] of their values.

Addresses are passed as integers: to pass a part of an array counts references to it, which threads do by turns.

Numba keeps compiled code on disk by the file of the outermost function: after a change here, or of the constants in
`analyse`, delete the `__pycache__` of this folder.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fedproxy.aggregation.analyse import BLOCK

F32, BF16, F16 = 0, 1, 2
"""Formats of values in the table."""

LOWEST = -(1 << 31)
MAGNITUDE = (1 << 31) - 1
"""Bits of -0.0 as int32, and those of a float32 without its sign."""

AHEAD = 1 << 13
"""So many values, over all clients, are fetched into the cache before they are worked on."""

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile on first use without Python's lock, and keep the code on disk where there is a place for it."""
    try:
        return cast(Function, numba.njit(nogil=True, error_model="numpy", cache=True)(function))
    except RuntimeError:  # no directory to write to
        return cast(Function, numba.njit(nogil=True, error_model="numpy")(function))


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An integer address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@intrinsic
def _fetch(typing: Any, address: Any, size: Any) -> Any:
    """Ask for `size` bytes from an address on, which need not be valid, to be brought into the cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        fetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, number, number, number]), "llvm.prefetch.p0"
        )
        start = builder.inttoptr(arguments[0], byte)
        with cgutils.for_range_slice(builder, ir.IntType(64)(0), arguments[1], ir.IntType(64)(64), inc=True) as (at, _):
            builder.call(fetch, [builder.gep(start, [at]), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def bits_of(typing: Any, value: Any) -> Any:
    """The bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def value_of(typing: Any, bits: Any) -> Any:
    """The float32 of the given bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@numba.njit(inline="always")
def block(addresses, k, starts, formats, tensor, begin, stop, ahead, scratch):
    """One client's values begin ... stop as float32 bits, in place where they lie so, else in `scratch`.

    The processor does not foresee many short stretches by itself, so those to come are fetched.

    Args:
        addresses: Table.
        k: The client.
        starts: Table.
        formats: Table.
        tensor: The tensor that holds the first value.
        begin: First coordinate.
        stop: The one after the last, at most `BLOCK` later.
        ahead: How many coordinates later the block lies that is fetched into the cache meanwhile.
        scratch: Address of `BLOCK` int32; what the values leave of it is not changed.

    Returns:
        The address of `BLOCK` int32.
    """
    item = 4 if formats[tensor] == F32 else 2
    place = addresses[k, tensor] + item * (begin - starts[tensor])
    _fetch(place + item * ahead, item * BLOCK)
    if formats[tensor] == F32 and stop - begin == BLOCK and stop <= starts[tensor + 1]:
        return place
    return _gathered(addresses, k, starts, formats, tensor, begin, stop, scratch)


@compiled
def _gathered(addresses, k, starts, formats, tensor, begin, stop, scratch):
    """A client's values begin ... stop in `scratch`, see `block`."""
    position = begin
    while position < stop:
        while starts[tensor + 1] <= position:
            tensor += 1
        count = min(stop, starts[tensor + 1]) - position
        offset = position - starts[tensor]
        target = scratch + 4 * (position - begin)
        bits = numba.carray(pointer(target), count, np.int32)
        if formats[tensor] == F32:
            whole = numba.carray(pointer(addresses[k, tensor] + 4 * offset), count, np.int32)
            for i in range(count):
                bits[i] = whole[i]
        else:
            half = numba.carray(pointer(addresses[k, tensor] + 2 * offset), count, np.uint16)
            if formats[tensor] == BF16:
                for i in range(count):
                    bits[i] = np.int32(np.uint32(half[i]) << np.uint32(16))
            else:
                for i in range(count):
                    bits[i] = _from_f16(half[i])
        position += count
    return scratch


@compiled
def _from_f16(half):
    """The bits of a float16 as those of the float32 of the same value."""
    magnitude = np.int32(half & np.uint16(0x7FFF))
    small = bits_of(np.float32(magnitude) * np.float32(2.0**-24))
    shift = np.int32(112 << 23) if magnitude < 0x7C00 else np.int32(224 << 23)
    wide = small if magnitude < 0x400 else np.int32((magnitude << 13) + shift)
    return np.int32(wide | np.int32(np.uint32(half & np.uint16(0x8000)) << np.uint32(16)))


@compiled
def tensor_at(starts, position):
    """Number of the tensor that holds a coordinate of the long vector."""
    return np.searchsorted(starts, position, side="right") - 1
