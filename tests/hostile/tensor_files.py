"""Safetensors files made to do harm: they lie about themselves, or announce gigantic things.

Each attack is a row: its name → a function that writes the file.
"""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 1 << 20
HEADER_LIMIT = 32 * MIB
ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

Attack = Callable[[Path], object]


def safetensors(header: object, body: bytes = bytes(8)) -> bytes:
    """A safetensors file with that header, given as bytes or as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _entry(**changes: Any) -> bytes:
    return safetensors({"w": {**ENTRY, **changes}})


def sparse(length: int) -> Attack:
    """A file of `length` bytes that takes no disk, all of it announced as header."""

    def write(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", length - 8) + b"{")
        os.truncate(path, length)

    return write


def repeated(path: Path, size: int, before: bytes, piece: bytes, after: bytes, start: bytes = b"") -> None:
    """Write `start` and almost `size` bytes that repeat `piece`, a little at a time."""
    left = (size - len(before) - len(after)) // len(piece)
    with open(path, "wb") as file:
        file.write(start + before)
        while left:
            count = min(left, MIB)
            file.write(piece * count)
            left -= count
        file.write(after)


def _filled(before: str, piece: str, after: str, size: int = HEADER_LIMIT) -> Attack:
    """A header of exactly `size` bytes that repeats `piece`, and no data."""

    def write(path: Path) -> None:
        pad = " " * ((size - len(before) - len(after)) % len(piece))
        repeated(path, size, before.encode(), piece.encode(), (after + pad).encode(), struct.pack("<Q", size))

    return write


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


class _Payload:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("pickle-was-run",)


_W = json.dumps(ENTRY)
CONTENTS: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header one byte too long": struct.pack("<Q", 3) + b"{}",
    "header of 2**64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "pickle": pickle.dumps(_Payload()),
    "old pickle": pickle.dumps(_Payload(), protocol=0),
    "zip": b"PK\x03\x04" + bytes(100),
    "empty header": safetensors(b""),
    "no JSON": safetensors(b"{{{{"),
    "no UTF-8": safetensors(b'{"\xff\xfe": %s}' % _W.encode()),
    "list": safetensors([1, 2]),
    "null": safetensors(None),
    "list as entry": safetensors({"w": [1, 2]}),
    "null as entry": safetensors({"w": None}),
    "empty entry": safetensors({"w": {}}),
    "two documents": safetensors(f'{{"w":{_W}}}{{"v":{_W}}}'.encode()),
    "comma at the end": safetensors(f'{{"w":{_W},}}'.encode()),
    "no end": safetensors(f'{{"w":{_W}'.encode()),
    "overlap": safetensors({"w": ENTRY, "v": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
    "the same bytes twice": safetensors({"w": ENTRY, "v": ENTRY}),
    "gap": safetensors({"w": ENTRY, "v": {**ENTRY, "data_offsets": [12, 20]}}, bytes(20)),
    "out of range": _entry(data_offsets=[8, 16]),
    "far out of range": _entry(data_offsets=[2**62, 2**62 + 8]),
    "negative offsets": _entry(data_offsets=[-8, 0]),
    "offsets into the header": safetensors({"w": {**ENTRY, "data_offsets": [-16, -8]}, "v": ENTRY}),
    "backward offsets": _entry(data_offsets=[8, 0]),
    "one offset": _entry(data_offsets=[8]),
    "three offsets": _entry(data_offsets=[0, 4, 8]),
    "offsets as text": _entry(data_offsets=["0", "8"]),
    "offsets as floats": _entry(data_offsets=[0.0, 8.0]),
    "offsets as booleans": _entry(dtype="U8", shape=[1], data_offsets=[False, True]),
    "offsets as NaN": safetensors(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}'),
    "shape as booleans": _entry(shape=[True, 2]),
    "shape as floats": _entry(shape=[2.0]),
    "shape as text": _entry(shape="2"),
    "shape as number": _entry(shape=2),
    "negative shape": _entry(shape=[-1, -2]),
    "gigantic shape": _entry(shape=[2**62]),
    "shape that overflows to the size": _entry(shape=[2**61 + 1, 2]),
    "shape of a thousand digits": safetensors(
        b'{"w":{"dtype":"F32","shape":[1%s],"data_offsets":[0,8]}}' % (b"0" * 1000)
    ),
    "no value and a gigantic side": safetensors(
        {"v": {**ENTRY, "shape": [0, 10**30], "data_offsets": [0, 0]}, "w": ENTRY}
    ),
    "no value and sides that overflow": safetensors(
        {"v": {**ENTRY, "shape": [2**40, 0, 2**40], "data_offsets": [0, 0]}, "w": ENTRY}
    ),
    "gigantic number of dimensions": _entry(shape=[1] * 100_000),
    "unknown dtype": _entry(dtype="F99"),
    "dtype as list": _entry(dtype=["F32"]),
    "dtype missing": safetensors({"w": {"shape": [2], "data_offsets": [0, 8]}}),
    "truncated data": safetensors({"w": ENTRY}, bytes(7)),
    "data after the end": safetensors({"w": ENTRY}, bytes(9)),
    "duplicate name": safetensors(f'{{"w":{_W},"w":{_W}}}'.encode()),
    "duplicate name, escaped": safetensors(f'{{"w":{_W},"\\u0077":{_W}}}'.encode()),
    "duplicate key in an entry": safetensors(
        b'{"w":{"dtype":"F32","shape":[99],"shape":[2],"data_offsets":[0,8]}}',
    ),
    "duplicate metadata": safetensors(f'{{"__metadata__":{{}},"w":{_W},"__metadata__":{{}}}}'.encode()),
    "metadata that are no text": safetensors({"__metadata__": {"format": 1}, "w": ENTRY}),
    "metadata as list": safetensors({"__metadata__": ["pt"], "w": ENTRY}),
    "half a surrogate pair": safetensors(f'{{"\\ud800":{_W}}}'.encode()),
    "nested lists": safetensors(b"[" * 100_000 + b"]" * 100_000),
    "nested entry": safetensors(b'{"w":' * 100_000 + b"1" + b"}" * 100_000),
    "nested shape": safetensors(b'{"w":{"dtype":"F32","shape":%s2%s}}' % (b"[" * 2000, b"]" * 2000)),
    "nested metadata": safetensors(b'{"__metadata__":{"a":%s%s}}' % (b"[" * 100_000, b"]" * 100_000)),
}


def _writer(content: bytes) -> Attack:
    return lambda path: path.write_bytes(content)


TENSOR_FILES: dict[str, Attack] = {
    **{name: _writer(content) for name, content in CONTENTS.items()},
    "directory": lambda path: (path.unlink(missing_ok=True), path.mkdir()),
    "pipe": pipe,
}
"""Attacks on a safetensors file."""

GIGANTIC_TENSOR_FILES: dict[str, Attack] = {
    "header of 64 GiB": sparse(64 * 1024 * MIB),
    "header over the limit": sparse(HEADER_LIMIT + 9),
    "lists up to the limit": _filled('{"w":[', "[],", "[]]}"),
    "lists in an entry": _filled('{"w":{"shape":[', "[],", "[]]}}"),
    "tables up to the limit": _filled('{"w":[', "{},", "{}]}"),
    "a long name": _filled('{"', "a", f'":{_W}}}'),
    "a name without end": _filled('{"', '\\"', ""),
    "text in an entry": _filled('{"w":{"dtype":"', "F", '"}}'),
    "nothing but space": _filled("{", " ", ""),
    "metadata up to the limit": _filled('{"__metadata__":{"a":[', "[],", "[]]}}"),
    "metadata within its limit": _filled('{"__metadata__":{"a":[', "[],", "[]]}}", 4 * MIB),
}
"""Attacks whose harm is the memory or the time that believing them would take."""
