"""Named tensors seen as one long vector: sorted by name, flattened, walked in chunks of bounded memory."""

import hashlib
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedproxy.errors import ArtifactError

Tensors = Mapping[str, torch.Tensor]

CHUNK_ELEMENTS = 1 << 17
"""Values held at once by a walk over several vectors (512 KiB in float32), whatever the vectors' length."""

ACCELERATED = 128
"""So many times as many are held on a GPU, where each chunk costs calls and not cache."""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Span:
    """A stretch of one tensor: its flattened values from `start` up to `stop`."""

    name: str
    start: int
    stop: int

    def of(self, tensors: Tensors) -> torch.Tensor:
        """The stretch itself, [stop - start]; a view where the tensor is contiguous."""
        return tensors[self.name].detach().reshape(-1)[self.start : self.stop]


def parameter_count(tensors: Tensors) -> int:
    """Number of values in all tensors together."""
    return sum(tensor.numel() for tensor in outlines(tensors).values())


def outlines(tensors: Tensors) -> Tensors:
    """The tensors for their shapes, dtypes and device alone: without values where these would have to be computed."""
    return tensors.outlines if isinstance(tensors, ComputedTensors) else tensors


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and values, 64 hex digits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_layout(reference: Tensors, other: Tensors, name: str) -> None:
    """Check that `other` has exactly the names, shapes and dtypes of `reference`.

    Raises:
        ArtifactError: a tensor is missing, unknown, or of another shape or dtype; `name` says whose it is.
    """
    reference, other = outlines(reference), outlines(other)
    for tensor in sorted(reference.keys() - other.keys()):
        raise ArtifactError(f"{name}: the tensor {tensor} is missing. Updates of one round must hold the same tensors.")
    for tensor in sorted(other.keys() - reference.keys()):
        raise ArtifactError(f"{name}: the tensor {tensor} is unknown. Updates of one round must hold the same tensors.")
    for tensor in sorted(reference):
        want, have = reference[tensor], other[tensor]
        if have.shape != want.shape:
            raise ArtifactError(f"{name}: {tensor} has shape {list(have.shape)}, expected {list(want.shape)}.")
        if have.dtype != want.dtype:
            raise ArtifactError(f"{name}: {tensor} has dtype {have.dtype}, expected {want.dtype}.")


def check_finite(tensors: Tensors, name: str) -> None:
    """Check that no value is NaN or infinite.

    Raises:
        ArtifactError: a tensor holds one; `name` says whose it is.
    """
    for spans in chunks(tensors, CHUNK_ELEMENTS):
        for span in spans:
            finite = torch.isfinite(span.of(tensors))
            if not finite.all():
                index = span.start + int((~finite).nonzero()[0])
                raise ArtifactError(
                    f"{name}: {span.name} holds a NaN or Inf (flat index {index}). Leave this update out."
                )


def chunks(tensors: Tensors, size: int) -> Iterator[list[Span]]:
    """Cut the long vector into chunks of `size` values (the last may be shorter), each a list of spans in order."""
    spans: list[Span] = []
    room = size
    tensors = outlines(tensors)
    for name in sorted(tensors):
        start, end = 0, tensors[name].numel()
        while start < end:
            stop = min(end, start + room)
            spans.append(Span(name, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield spans
                spans, room = [], size
    if spans:
        yield spans


def stacked(vectors: Sequence[Tensors], elements: int = CHUNK_ELEMENTS) -> Iterator[tuple[list[Span], torch.Tensor]]:
    """Walk several vectors of one layout side by side.

    Args:
        vectors: K mappings with the same names and shapes.
        elements: Values held at once, on a GPU `ACCELERATED` times as many; a chunk has n = values // K coordinates (at
            least one).

    Yields:
        The spans of a chunk and its values [K, n], float32, or float64 if any tensor is. The buffer is used
        again for the next chunk; the caller may change it.
    """
    first = outlines(vectors[0])
    device = next(iter(first.values())).device
    held = elements if device.type == "cpu" else elements * ACCELERATED
    size = max(1, min(held // len(vectors), parameter_count(first)))
    wide = any(tensor.dtype == torch.float64 for tensor in first.values())
    buffer = torch.empty(len(vectors) * size, dtype=torch.float64 if wide else torch.float32, device=device)
    for spans in chunks(first, size):
        width = sum(span.stop - span.start for span in spans)
        values = buffer[: len(vectors) * width].view(len(vectors), width)
        for row, vector in zip(values, vectors, strict=True):
            position = 0
            for span in spans:
                length = span.stop - span.start
                row[position : position + length].copy_(span.of(vector))
                position += length
        yield spans, values


class MappedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, mapped: pages are read when touched and given back at the next access.

    So a walk over a file of any size keeps one chunk of it resident. Tensors must not be written to: a change
    never reaches the file, and is lost at the next access.

    Args:
        path: The file.
        entries: Its checked header (`artifacts.read_header(path).entries`): name → dtype, shape, first and last byte.

    Raises:
        ArtifactError: the file cannot be read, or a tensor is not floating point.
    """

    def __init__(self, path: Path, entries: Mapping[str, tuple[str, tuple[int, ...], int, int]]) -> None:
        for name, (dtype, *_) in entries.items():
            if dtype not in _FLOATS:
                raise ArtifactError(f"{path}: {name} has dtype {dtype}, only {', '.join(_FLOATS)} can be merged.")
        self._entries = entries
        try:
            with open(path, "rb") as file:
                self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path}: {error}.") from error
        self._bytes = torch.frombuffer(self._pages, dtype=torch.uint8)

    @property
    def aligned(self) -> bool:
        """Whether every tensor lies at its natural alignment, so that `[name]` is the mapped memory itself."""
        return all(begin % _FLOATS[dtype].itemsize == 0 for dtype, _, begin, _ in self._entries.values())

    def release(self) -> None:
        """Give all pages back; a tensor that is still held reads them again."""
        self._pages.madvise(mmap.MADV_DONTNEED)

    def __getitem__(self, name: str) -> torch.Tensor:
        dtype, shape, begin, end = self._entries[name]
        self.release()
        piece = self._bytes[begin:end]
        if begin % _FLOATS[dtype].itemsize:  # a file may pack tensors off their natural alignment
            piece = piece.clone()
        return piece.view(_FLOATS[dtype]).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class ComputedTensors(Mapping[str, torch.Tensor]):
    """Tensors that are computed when touched; the last one is kept, so that a walk computes each of them once.

    Args:
        outlines: For each name, a tensor of the shape, dtype and device; its values do not count (`outline` makes one
            that takes no memory).
        compute: A name → its tensor, with the same bits every time.
    """

    def __init__(self, outlines: Tensors, compute: Callable[[str], torch.Tensor]) -> None:
        self.outlines = outlines
        self._compute = compute
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            if name not in self:
                raise KeyError(name)
            self._last = None  # given back before the next one is made
            self._last = (name, self._compute(name))
        return self._last[1]

    def __contains__(self, name: object) -> bool:
        return name in self.outlines

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)


def outline(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of that shape, dtype and device that takes no memory; its values say nothing."""
    return torch.empty((), dtype=dtype, device=device).expand(*shape)
