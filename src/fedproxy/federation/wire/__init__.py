"""What an update looks like on the wire. To add an encoding: a file here that ends in an `Encoding`, and its row."""

from collections.abc import Mapping
from typing import Any

from fedproxy.federation.wire.blockwise import INT4, INT8
from fedproxy.federation.wire.contract import Encoding
from fedproxy.federation.wire.feedback import feedback
from fedproxy.federation.wire.floats import BF16, FP32
from fedproxy.federation.wire.packing import pack_levels, packed_bytes, unpack_levels
from fedproxy.federation.wire.top_k import TOP_K
from fedproxy.registry import Axis, build

__all__ = ["ENCODINGS", "PLAIN", "Encoding", "encoding", "feedback", "pack_levels", "packed_bytes", "unpack_levels"]

PLAIN = FP32.name
"""The encoding that every client speaks."""

ENCODINGS: Axis[Encoding[Any]] = Axis(
    "encoding", "fedproxy.encodings", Encoding, {row.name: row for row in (FP32, BF16, INT8, INT4, TOP_K)}
)


def encoding(name: str, given: Mapping[str, object]) -> tuple[Encoding[Any], Any]:
    """The encoding called `name` and its options, as an experiment gives them.

    Raises:
        UsageError: there is none of that name, an option is unknown, or its value of the wrong type or out of range.
    """
    row = ENCODINGS.choose(name)
    return row, build("encoding", name, row.options, given)
