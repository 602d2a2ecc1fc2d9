"""Safetensors files: headers checked before a tensor is touched, files written as streams, atomically."""

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedproxy.artifacts import new_file
from fedproxy.errors import ArtifactError
from fedproxy.tensors import outlines

DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Data types by their name in safetensors headers, in the order in which safetensors lays tensors out in a file."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file: where each tensor lies, checked against the file's length.

    Attributes:
        entries: For each tensor, its safetensors dtype name, shape, and byte range in the file.
        metadata: The header's string metadata.
    """

    entries: dict[str, tuple[str, tuple[int, ...], int, int]]
    metadata: dict[str, str]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


_HEADER_LIMIT = 32 << 20
"""Bytes of a header that is read: an entry takes some 130, so a quarter of a million tensors in one file."""
_METADATA_LIMIT = 4 << 20
_ENTRY_LIMIT = 4096
_EXTENT_LIMIT = 1 << 60
"""A tensor without values may have a long side beside one of 0; torch counts in 63 bits."""
_STRING = r'"(?:[^"\\]++|\\.)*+"'
_ENTRY = re.compile(rf'\s*({_STRING})\s*:\s*(\{{(?:[^{{}}"]++|{_STRING})*+\}})\s*([,}}])', re.DOTALL)
_EMPTY = re.compile(r"\{\s*\}\s*")
_JSON = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def _pairs(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parse a header entry by entry, so that a bad one is refused before what follows it takes memory."""
    if _EMPTY.fullmatch(text):
        return
    position, delimiter = 1, "," if text.startswith("{") else ""
    while delimiter == ",":
        if not (found := _ENTRY.match(text, position)):
            raise ValueError(f"there is no table of a tensor at character {position}")
        name = _JSON.decode(found[1])
        name.encode()  # fails on half a surrogate pair, which could not be written again
        if len(found[0]) > (_METADATA_LIMIT if name == "__metadata__" else _ENTRY_LIMIT):
            raise ValueError(f"the entry at character {position} takes {len(found[0])} characters")
        yield name, _JSON.decode(found[2])
        position, delimiter = found.end(), found[3]
    if delimiter != "}" or text[position:].strip():
        raise ValueError("it is not one table of tensors")


def _extent(name: str, entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """Check one entry by itself: its data type, shape, and first and last byte in the data."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{name!r} has the unknown data type {dtype!r}")
    if (
        type(shape) is not list
        or any(type(extent) is not int or extent < 0 for extent in shape)
        or prod(max(extent, 1) for extent in shape) >= _EXTENT_LIMIT
    ):
        raise ValueError(f"{name!r} has shape {shape!r}")
    if type(offsets) is not list or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise ValueError(f"{name!r} has data_offsets {offsets!r}")
    begin, end = offsets
    if begin < 0 or end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name!r} of shape {shape} and data type {dtype} cannot lie at the bytes {begin} to {end}")
    return dtype, tuple(shape), begin, end


def read_header(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file; no tensor is touched.

    Nothing it says is believed: the tensors must fill the rest of the file exactly, and a header is read only up to
    32 MiB, so that a hostile one costs no more memory than a large honest one.

    Raises:
        ArtifactError: the file is missing, truncated, or its header does not describe its bytes exactly.
    """
    path = Path(path)
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    metadata: dict[str, str] | None = None
    try:
        if not S_ISREG(path.stat().st_mode):
            raise ArtifactError(f"{path} is no file.")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > size - 8:
                raise ArtifactError(f"{path} is not a safetensors file, or is truncated.")
            if length > _HEADER_LIMIT:
                raise ValueError(f"it takes {length} bytes, {_HEADER_LIMIT} are read at most")
            text = file.read(length).decode()
        start = 8 + length
        for name, entry in _pairs(text):
            if name in entries or (name == "__metadata__" and metadata is not None):
                raise ValueError(f"{name!r} occurs twice")
            if name == "__metadata__":
                metadata = entry
                if not all(type(value) is str for value in metadata.values()):
                    raise ValueError("its metadata are not all strings")
            else:
                dtype, shape, begin, end = _extent(name, entry)
                entries[name] = (dtype, shape, start + begin, start + end)
        position = start
        for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
            if begin != position:
                raise ValueError(f"{name!r} overlaps another tensor or leaves a gap")
            position = end
        if position != size:
            raise ValueError(f"it describes {position} bytes, the file has {size}: truncated or padded")
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: the safetensors header is invalid: {error}.") from error
    return TensorFile(entries, metadata or {})


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Load every tensor of a safetensors file.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: {error}.") from error


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if flat.numel() else b"")  # type: ignore[arg-type]


def header_bytes(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The beginning of a safetensors file whose tensors follow each other in the order of `entries`.

    Args:
        entries: Name → safetensors dtype name and shape.
        metadata: String metadata; "format" is always "pt".
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, (dtype, shape) in entries.items():
        size = DTYPES[dtype].itemsize * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    chunks: Iterable[torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = True,
) -> None:
    """Write a safetensors file from a stream of chunks, so that no whole tensor need be in memory.

    The same layout and values give the same bytes.

    Args:
        path: The file.
        layout: Name → (dtype, shape); the tensors are written in sorted name order.
        chunks: Pieces of the tensors' flattened values, in that order, of any length.
        metadata: String metadata for the header.
        overwrite: Replace an existing file.
    """
    header = header_bytes({name: (DTYPE_NAMES[layout[name][0]], layout[name][1]) for name in sorted(layout)}, metadata)
    total = sum(dtype.itemsize * prod(shape) for dtype, shape in layout.values())
    with new_file(path, overwrite=overwrite) as file:
        file.write(header)
        for chunk in chunks:
            file.write(tensor_bytes(chunk))
        if file.tell() != len(header) + total:
            raise AssertionError(f"{path}: {file.tell()} bytes written, {len(header) + total} announced")


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as one safetensors file, atomically; the same tensors give the same bytes."""
    write_tensors(
        path,
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in outlines(tensors).items()},
        (tensors[name].detach().cpu() for name in sorted(tensors)),
        metadata=metadata,
    )
