"""The merge with compiled kernels: three walks over the updates at the speed of memory, on all threads.

The first walk collects dot products and conflicts. The second finds what each client keeps: a sample brackets the
threshold, the walk counts what lies below the bracket and collects what lies within it, a few percent, among which the
exact threshold is selected. The third trims and combines. Results are those of the torch path bit for bit, whatever
the number of threads, so the choice between the two is one of speed alone.
"""

import importlib.util
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from fedproxy.aggregation.analyse import BLOCK, SEGMENT, Statistics, check_gram
from fedproxy.aggregation.merge.h_ties import elected_from, h_ties
from fedproxy.aggregation.merge.mean import mean
from fedproxy.aggregation.merge.ties import ties
from fedproxy.aggregation.merge.top_k import Threshold, thresholds
from fedproxy.tensors import ComputedTensors, MappedTensors, Tensors, chunks, outlines, parameter_count

SMALLEST = 1 << 22
"""Values of all updates together from which the kernels are quicker than torch, their loading counted."""

LARGEST_COMPUTED = 1 << 28
"""Values of all updates together up to which tensors that are computed when touched are all computed and held (1 GiB in
float32), as the kernels need it; beyond, torch walks them one tensor at a time."""

TASK_VALUES = 1 << 21
"""Values that one call of a kernel reads, about; at least those of one segment."""

RESIDENT_BYTES = 1 << 24
"""Mapped bytes read before their pages are given back."""

RUN, RUNS = 16, 4096
"""A sample of a vector: so many runs of so many neighbours, evenly spaced."""

MARGIN = 5.0
"""Half the width of the bracket around a threshold, in standard deviations of the sample's quantile."""

ROOM = 8
"""One in so many values of a segment may lie in the bracket; with more the threshold is found without a sample."""

LEAST_FACTOR = 2.0**-800
"""From here on the product of a factor and the smallest float32 is well within float64."""

_COMBINED: dict[Callable[..., torch.Tensor], int] = {mean: 0, ties: 1, h_ties: 2}
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INFINITY = 0x7F800000
_MOST = 0x7F7FFFFF

Result = TypeVar("Result")
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """What each client keeps, K clients and S segments.

    Attributes:
        thresholds: Of each client's vector; none where everything is kept.
        limits: Magnitude bits from which entries are kept, [S, K], int32.
        ties: How many entries at the limit are kept, [S, K]; negative for all.
    """

    thresholds: list[Threshold | None]
    limits: npt.NDArray[np.int32]
    ties: Integers


def kernels_for(updates: Sequence[Tensors]) -> "Kernels | None":
    """The kernels over these updates, of one checked layout; none where torch serves them better or alone can."""
    values = len(updates) * parameter_count(updates[0])
    if values < SMALLEST or importlib.util.find_spec("numba") is None:
        return None
    if values > LARGEST_COMPUTED and any(isinstance(update, ComputedTensors) for update in updates):
        return None
    readable = all(
        tensor.dtype in _FORMATS and tensor.device.type == "cpu" and tensor.is_contiguous()
        for update in updates
        for tensor in update.values()
    )
    aligned = all(update.aligned for update in updates if isinstance(update, MappedTensors))
    return Kernels(updates) if readable and aligned else None


def combines(combine: Callable[..., torch.Tensor], factors: Sequence[float]) -> bool:
    """Whether there is a kernel for a rule's `combine` with these factors of the clients' values, [K].

    The kernels read a sign before they multiply by the factor, so no product may vanish.
    """
    return combine in _COMBINED and min(factors) >= LEAST_FACTOR


class Kernels:
    """Compiled walks over K updates that lie in memory or are mapped.

    Args:
        updates: Of one layout, on the CPU, contiguous, float32, bfloat16 or float16.
    """

    def __init__(self, updates: Sequence[Tensors]) -> None:
        from fedproxy.aggregation.merge import compiled

        self._code: Any = compiled
        self._updates = updates
        self._names = [name for name in sorted(updates[0]) if outlines(updates[0])[name].numel()]
        self._held = [[update[name].detach() for name in self._names] for update in updates]
        first = self._held[0]
        self._addresses = np.array([[tensor.data_ptr() for tensor in row] for row in self._held], dtype=np.int64)
        self._starts = np.cumsum([0] + [tensor.numel() for tensor in first], dtype=np.int64)
        self._formats = np.array([_FORMATS[tensor.dtype] for tensor in first], dtype=np.int64)
        self._clients, self._parameters = len(updates), int(self._starts[-1])
        self._segments = math.ceil(self._parameters / SEGMENT)
        self._step = max(1, TASK_VALUES // (self._clients * SEGMENT))
        self._threads = torch.get_num_threads()

    def _walk(self, work: Callable[[range], Result]) -> Iterator[Result]:
        """The results of `work` on all segments, a few at a time, in order."""
        item = max(tensor.element_size() for tensor in self._held[0])
        task_bytes, read = self._step * SEGMENT * self._clients * item, 0
        pending: deque[Future[Result]] = deque()
        tasks = [
            range(begin, min(begin + self._step, self._segments)) for begin in range(0, self._segments, self._step)
        ]
        with ThreadPoolExecutor(self._threads, thread_name_prefix="merge") as pool:
            for segments in tasks:
                pending.append(pool.submit(work, segments))
                if len(pending) <= self._threads + 2:
                    continue
                yield pending.popleft().result()
                read += task_bytes
                if read >= RESIDENT_BYTES:
                    read = 0
                    self._release()
            while pending:
                yield pending.popleft().result()
        self._release()

    def _release(self, *clients: int) -> None:
        """Give back the pages of some clients, or of all."""
        for k in clients or range(self._clients):
            update = self._updates[k]
            if isinstance(update, MappedTensors):
                update.release()

    def measure(self, names: Sequence[str], levels: Tensors | None = None) -> Statistics:
        """As `analyse.measure`, for checked updates.

        Raises:
            ArtifactError: an update holds NaN or Inf.
        """
        count = self._clients
        disagreement = np.empty(0 if levels is None else self._parameters, dtype=np.uint8 if count < 256 else np.int16)

        def work(segments: range) -> tuple[npt.NDArray[np.float64], Integers]:
            gram = np.empty((len(segments), count, count))
            histogram = np.zeros(count + 1, dtype=np.int64)
            bounds = (segments.start, segments.stop)
            self._code.measure(self._addresses, self._starts, self._formats, bounds, gram, histogram, disagreement)
            return gram, histogram

        total, histogram = np.zeros((count, count)), np.zeros(count + 1, dtype=np.int64)
        for products, counts in self._walk(work):
            for product in products:
                total += product
            histogram += counts
        gram = torch.from_numpy(total)
        check_gram(gram, self._updates, names)
        if levels is not None:
            start = 0
            for name in sorted(levels):
                target = levels[name].reshape(-1).numpy()
                target[:] = disagreement[start : start + len(target)]
                start += len(target)
        return Statistics(list(names), self._parameters, gram, histogram.tolist())

    def select(self, keep: Sequence[int]) -> Selection:
        """What `top_k.thresholds` selects, and what that means in each segment.

        Args:
            keep: How many entries to keep of each client.
        """
        limits = np.zeros((self._segments, self._clients), dtype=np.int32)
        left: Integers = np.full((self._segments, self._clients), -1, dtype=np.int64)
        found: list[Threshold | None] = [None] * self._clients
        for k, count in enumerate(keep):
            if count <= 0:
                found[k], limits[:, k] = Threshold(_INFINITY, 0), _INFINITY
        rows = [k for k, count in enumerate(keep) if 0 < count < self._parameters]
        if rows:
            for k, (threshold, equal) in zip(rows, self._selected(rows, [keep[k] for k in rows]), strict=True):
                found[k] = threshold
                if threshold.bits == 0:
                    continue
                kept = np.clip(threshold.ties - (np.cumsum(equal) - equal), 0, equal)
                limits[:, k] = threshold.bits + (kept == 0)
                left[:, k] = np.where((kept > 0) & (kept < equal), kept, -1)
        return Selection(found, limits, left)

    def _selected(self, rows: Sequence[int], keep: Sequence[int]) -> list[tuple[Threshold, Integers]]:
        """For each of the clients `rows`, its threshold and the number of entries at it in each segment, [S]."""
        low, high = self._brackets(rows, keep)
        parts = self._bracketed(rows, low, high)
        below, equal = np.stack([part[0] for part in parts]), np.stack([part[1] for part in parts])

        def chosen(row: int) -> tuple[Threshold, Integers] | None:
            within = [found[offsets[row] : offsets[row + 1]] for _, _, found, offsets in parts]
            ends = np.cumsum([len(part) for part in within])
            under, at, dropped = int(below[:, row].sum()), int(equal[:, row].sum()), self._parameters - keep[row]
            if equal[:, row].min() < 0 or not under <= dropped < under + at + int(ends[-1]):
                return None
            if dropped < under + at:
                return Threshold(int(low[row]), under + at - dropped), equal[:, row]
            magnitudes, rank = np.concatenate(within), dropped - under - at
            bits = int(np.partition(magnitudes, rank)[rank])
            places = np.flatnonzero(magnitudes == bits)
            smaller = int((magnitudes < bits).sum())
            return Threshold(bits, len(places) + smaller - rank), np.diff(np.searchsorted(places, ends), prepend=0)

        with ThreadPoolExecutor(self._threads) as pool:
            found = list(pool.map(chosen, range(len(rows))))
        return [
            self._without_sample(rows[row], keep[row]) if result is None else result for row, result in enumerate(found)
        ]

    def _table(self, rows: Sequence[int]) -> tuple[Integers, Integers, Integers]:
        """Where the values of some clients lie, for the compiled code."""
        return np.ascontiguousarray(self._addresses[list(rows)]), self._starts, self._formats

    def _bracketed(
        self, rows: Sequence[int], low: Integers, high: Integers
    ) -> list[tuple[Integers, Integers, npt.NDArray[np.int32], Integers]]:
        """What `compiled.bracket` gives of each segment: `below`, `equal`, `found` and `offsets`."""
        table, room = self._table(rows), max(SEGMENT // ROOM, 2 * BLOCK)

        def work(segments: range) -> list[tuple[Integers, Integers, npt.NDArray[np.int32], Integers]]:
            magnitudes = np.empty(len(rows) * room, dtype=np.int32)
            parts = []
            for segment in segments:
                below, equal = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.int64)
                offsets: Integers = np.empty(len(rows) + 1, dtype=np.int64)
                self._code.bracket(*table, segment, low, high, below, equal, magnitudes, offsets, room)
                parts.append((below, equal, magnitudes[: offsets[-1]].copy(), offsets))
            return parts

        return [part for some in self._walk(work) for part in some]

    def _brackets(self, rows: Sequence[int], keep: Sequence[int]) -> tuple[Integers, Integers]:
        """Magnitude bits between which each client's threshold lies, by a sample."""
        table, step = self._table(rows), max(RUN, self._parameters // RUNS)

        def drawn(row: int) -> tuple[int, int]:
            magnitudes = np.empty(math.ceil(self._parameters / step) * RUN, dtype=np.int32)
            taken = self._code.sample(table[0], row, *table[1:], step, RUN, magnitudes)
            self._release(rows[row])
            share = 1.0 - keep[row] / self._parameters
            margin = MARGIN * math.sqrt(taken * share * (1.0 - share)) + 2.0
            first, last = math.floor(share * taken - margin), math.ceil(share * taken + margin)
            within = [place for place in (first, last) if 0 <= place < taken]
            ordered = np.partition(magnitudes[:taken], within) if within else magnitudes
            return int(ordered[first]) if first >= 0 else 0, int(ordered[last]) if last < taken else _MOST

        with ThreadPoolExecutor(self._threads) as pool:
            low, high = zip(*pool.map(drawn, range(len(keep))), strict=True)
        return np.array(low, dtype=np.int64), np.array(high, dtype=np.int64)

    def _without_sample(self, client: int, keep: int) -> tuple[Threshold, Integers]:
        """For an update with many entries of a few magnitudes, or laid out so that it deceives the sample."""
        (threshold,) = thresholds([self._updates[client]], [keep])
        if threshold is None:
            raise AssertionError(f"client {client} keeps everything")
        limit = np.array([threshold.bits], dtype=np.int64)
        return threshold, np.concatenate([equal for _, equal, _, _ in self._bracketed([client], limit, limit)])

    def combined(
        self,
        combine: Callable[..., torch.Tensor],
        selection: Selection,
        weights: Sequence[float],
        factors: Sequence[float],
        options: Any,
        into: Tensors | None = None,
    ) -> Iterator[tuple[torch.Tensor, int]]:
        """The merged vector piece by piece in order, in the dtype of each tensor, with the number of its zeros.

        Args:
            combine: That of a rule; there is a kernel for it.
            selection: What each client keeps.
            weights: Of the clients, [K].
            factors: By which each client's values are multiplied, [K].
            options: The rule's.
            into: Tensors that receive the merged vector; without them every piece has memory of its own.
        """
        rho = elected_from(options) if combine is h_ties else 0.0
        rule, w, f = _COMBINED[combine], np.array(weights), np.array(factors)
        numbers = {name: number for number, name in enumerate(self._names)}
        spans = list(chunks(dict(zip(self._names, self._held[0], strict=True)), self._step * SEGMENT))

        def work(segments: range) -> list[tuple[torch.Tensor, int]]:
            pieces, out = [], np.zeros(len(numbers), dtype=np.int64)
            for span in spans[segments.start // self._step]:
                dtype = self._held[0][numbers[span.name]].dtype
                piece = torch.empty(span.stop - span.start, dtype=dtype) if into is None else span.of(into)
                pieces.append(piece)
                out[numbers[span.name]] = piece.data_ptr() - dtype.itemsize * span.start
            table, zeros = (self._addresses, self._starts, self._formats), 0
            for segment in segments:
                limits, left = selection.limits[segment], selection.ties[segment]
                zeros += self._code.combine(rule, *table, segment, limits, left, w, f, rho, out)
            return [(piece, zeros if number == 0 else 0) for number, piece in enumerate(pieces)]

        for pieces in self._walk(work):
            yield from pieces
