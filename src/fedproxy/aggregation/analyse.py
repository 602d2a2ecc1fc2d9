"""How a round's updates relate: similarity, heterogeneity, weights, retention and conflict.

Reference: FedProxy (arXiv 2604.19015), Eq. 5-7 and 10; in words, docs/method.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedproxy.errors import ArtifactError, UsageError
from fedproxy.tensors import (
    CHUNK_ELEMENTS,
    Span,
    Tensors,
    check_finite,
    check_layout,
    outlines,
    parameter_count,
    stacked,
)

R0, DELTA = 1.0, 0.2
"""Eq. 10 unless a rule's options set it."""
EQUAL = 1e-9
"""Heterogeneities closer than this are one value: what remains between them is rounding of the dot products."""

LANES, BLOCK, SEGMENT = 8, 512, 1 << 16
"""The order in which a dot product is summed, so that neither chunks, nor threads, nor who computes it change a bit.

The long vector is cut into segments of `SEGMENT` coordinates, these into blocks of `BLOCK`. In a block lane l of
`LANES` sums the products at l, l + LANES, ... in this order; a segment sums its blocks lane by lane in order, then its
lanes in pairs; the segments are summed in order.
"""


@dataclass(frozen=True)
class Statistics:
    """What one walk over K updates of P parameters collects.

    Attributes:
        names: The clients' names.
        parameters: P.
        gram: Dot products of the updates, [K, K], float64.
        histogram: Coordinates by K - |sum of signs| = 0 ... K.
    """

    names: list[str]
    parameters: int
    gram: torch.Tensor
    histogram: list[int]


@dataclass(frozen=True)
class Analysis:
    """How K updates of P parameters relate, and what a merge rule made of it.

    Attributes:
        names: The clients' names.
        clients: K.
        parameters: P.
        similarity: Cosine of each pair of updates, Eq. 5.
        heterogeneity: How far each client is from the others, 0 (same direction) to 1.
        weights: Weight of each client, summing to one: of a merge those that its rule merged with, none if it weighs
            nobody; of `analyse` those of Eq. 6, with which H-TIES merges.
        retention: Share of its coordinates, the largest, that each client keeps: of a merge as its rule had it; of
            `analyse` that of Eq. 10, of H-TIES.
        conflict_mean: Mean over the coordinates of the conflict, Eq. 7.
        conflict_histogram: Number of coordinates with conflict 0, 1/K, ..., 1.
        zero_fraction: Share of zero coordinates in the merged vector; none if nothing was merged.
    """

    names: list[str]
    clients: int
    parameters: int
    similarity: list[list[float]]
    heterogeneity: list[float]
    weights: list[float] | None
    retention: list[float]
    conflict_mean: float
    conflict_histogram: list[int]
    zero_fraction: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The analysis as it goes into JSON."""
        return asdict(self)


def check_updates(updates: Sequence[Tensors], names: Sequence[str] | None) -> list[str]:
    """Check that updates can be compared, and name their clients.

    Args:
        updates: One mapping a client.
        names: The clients' names; without them "client 0", "client 1", ...

    Raises:
        UsageError: there is no update, or another number of names than of updates.
        ArtifactError: an update is empty, not floating point, or differs from the first in names, shapes or dtypes.
    """
    if not updates:
        raise UsageError("There is no update to merge. Give at least one.")
    names = [f"client {k}" for k in range(len(updates))] if names is None else list(names)
    if len(names) != len(updates):
        raise UsageError(f"{len(names)} names were given for {len(updates)} updates.")
    for name, update in zip(names, updates, strict=True):
        check_layout(updates[0], update, name)
    for tensor, value in outlines(updates[0]).items():
        if not value.is_floating_point():
            raise ArtifactError(f"{names[0]}: {tensor} has dtype {value.dtype}; only floating point can be merged.")
    if parameter_count(updates[0]) == 0:
        raise ArtifactError(f"{names[0]}: the update holds no parameters.")
    return names


def measure(
    updates: Sequence[Tensors],
    names: Sequence[str] | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    levels: Tensors | None = None,
) -> Statistics:
    """Check the updates and collect what the analysis needs, in one walk.

    Args:
        updates: One mapping a client.
        names: The clients' names.
        chunk_elements: Values held at once (at least one block of each client's).
        levels: Tensors that receive the disagreement of every coordinate (see `empty_levels`), if wanted.

    Raises:
        UsageError: there is no update, or another number of names than of updates.
        ArtifactError: an update differs from the first in names, shapes or dtypes, or holds NaN or Inf.
    """
    names = check_updates(updates, names)
    count = len(updates)
    device = next(iter(outlines(updates[0]).values())).device
    gram = torch.zeros(count, count, dtype=torch.float64, device=device)
    histogram = torch.zeros(count + 1, dtype=torch.int64, device=device)
    blocks = max(1, chunk_elements // count // BLOCK)
    lanes, done = torch.zeros(count, count, LANES, dtype=torch.float64, device=device), 0
    for spans, values in stacked(updates, blocks * BLOCK * count):
        for products in _block_products(values.double()).unbind(dim=2):
            lanes += products
            done += 1
            if done % (SEGMENT // BLOCK) == 0:
                gram += _summed_in_pairs(lanes)
                lanes.zero_()
        disagreement = _disagreement(values)
        histogram += torch.bincount(disagreement, minlength=count + 1)
        if levels is not None:
            parts = disagreement.split_with_sizes([span.stop - span.start for span in spans])
            for span, part in zip(spans, parts, strict=True):
                span.of(levels).copy_(part)
    gram = (gram + _summed_in_pairs(lanes)).cpu()
    check_gram(gram, updates, names)
    return Statistics(names, parameter_count(updates[0]), gram, histogram.tolist())


def _block_products(wide: torch.Tensor) -> torch.Tensor:
    """The lanes of the dot products of each block, see `BLOCK`: [K, n], float64 → [K, K, blocks, LANES]."""
    count, width = wide.shape
    padded = torch.nn.functional.pad(wide, (0, -width % BLOCK))
    steps = padded.view(count, -1, BLOCK // LANES, LANES).permute(2, 0, 1, 3).contiguous()
    total = torch.zeros(count, *steps.shape[1:], dtype=wide.dtype, device=wide.device)
    product = torch.empty_like(total)
    for step in steps:
        total += torch.mul(step[:, None], step[None], out=product)
    return total


def _summed_in_pairs(lanes: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, of length `LANES`, by halves: [..., LANES] → [...]."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def check_gram(gram: torch.Tensor, updates: Sequence[Tensors], names: Sequence[str]) -> None:
    """Check that the updates are finite, by their dot products [K, K].

    Raises:
        ArtifactError: one holds NaN or Inf, or its squared norm exceeds float64.
    """
    if not gram.isfinite().all():
        for name, update in zip(names, updates, strict=True):
            check_finite(update, name)
        raise ArtifactError(f"{', '.join(names)}: an update's squared norm exceeds float64. Leave it out.")


def _disagreement(values: torch.Tensor) -> torch.Tensor:
    """K - |sum of signs| per coordinate: [K, n] → [n], int64; 0 for a single client."""
    count = len(values)
    if count == 1:
        return torch.zeros(values.shape[1], dtype=torch.int64, device=values.device)
    return count - values.sign().sum(dim=0).abs().long()


def empty_levels(updates: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """Tensors for the disagreement K - |sum of signs| of every coordinate: uint8, or int16 from 256 clients on."""
    dtype = torch.uint8 if len(updates) < 256 else torch.int16
    return {name: torch.empty(t.shape, dtype=dtype, device=t.device) for name, t in outlines(updates[0]).items()}


def conflict_of(levels: Tensors, clients: int) -> dict[str, torch.Tensor]:
    """Conflict, Eq. 7, from the disagreement of K clients: C = levels / K, float32."""
    return {name: tensor.float() / clients for name, tensor in levels.items()}


def similarity(gram: torch.Tensor) -> torch.Tensor:
    """Cosine similarity, Eq. 5: s_kj = <τ_k, τ_j> / (‖τ_k‖ ‖τ_j‖), 0 where a norm is 0.

    Args:
        gram: Dot products, [K, K], float64.

    Returns:
        [K, K], in -1 ... 1.
    """
    norms = gram.diagonal().sqrt()
    lengths = norms[:, None] * norms[None, :]
    return torch.where(lengths > 0, gram / lengths, 0.0).clamp(-1.0, 1.0)


def heterogeneity(similarities: torch.Tensor) -> torch.Tensor:
    """How far each client is from the others: h_k = 1 - 1/(K-1) · Σ_{j≠k} max(0, s_kj); 0 for a single client.

    Args:
        similarities: [K, K].

    Returns:
        [K], in 0 ... 1.
    """
    count = len(similarities)
    if count == 1:
        return torch.zeros(1, dtype=similarities.dtype)
    return 1.0 - _others(similarities.clamp(min=0.0)) / (count - 1)


def weights(similarities: torch.Tensor) -> torch.Tensor:
    """Weight of each client, Eq. 6: w = softmax_k(Σ_{j≠k} |s_kj|).

    Args:
        similarities: [K, K].

    Returns:
        [K], positive, summing to one.
    """
    return torch.softmax(_others(similarities.abs()), dim=0)


def _others(matrix: torch.Tensor) -> torch.Tensor:
    """Row sums without the diagonal: [K, K] → [K]."""
    return (matrix - matrix.diagonal().diag()).sum(dim=1)


def retention(heterogeneities: torch.Tensor, r0: float = R0, delta: float = DELTA) -> torch.Tensor:
    """Share of its coordinates each client keeps, Eq. 10: r_k = clip(r0 - δ·ĥ_k, 0, 1); 1 for a single client.

    ĥ is h scaled to 0 ... 1 over the clients, and 0 if all are equal (up to rounding, see `EQUAL`).

    Args:
        heterogeneities: [K].
        r0: Share that the least heterogeneous client keeps.
        delta: How much less the most heterogeneous client keeps.

    Returns:
        [K], in 0 ... 1.
    """
    if len(heterogeneities) == 1:
        return torch.ones(1, dtype=heterogeneities.dtype)
    low, high = heterogeneities.min(), heterogeneities.max()
    scaled = torch.zeros_like(heterogeneities) if high - low <= EQUAL else (heterogeneities - low) / (high - low)
    return (r0 - delta * scaled).clamp(0.0, 1.0)


def describe(statistics: Statistics, r0: float = R0, delta: float = DELTA) -> Analysis:
    """Turn collected statistics into the analysis; `r0` and `delta` are those of Eq. 10."""
    count = len(statistics.names)
    similarities = similarity(statistics.gram)
    heterogeneities = heterogeneity(similarities)
    conflicts = sum(level * coordinates for level, coordinates in enumerate(statistics.histogram))
    return Analysis(
        names=statistics.names,
        clients=count,
        parameters=statistics.parameters,
        similarity=similarities.tolist(),
        heterogeneity=heterogeneities.tolist(),
        weights=weights(similarities).tolist(),
        retention=retention(heterogeneities, r0, delta).tolist(),
        conflict_mean=conflicts / (count * statistics.parameters),
        conflict_histogram=statistics.histogram,
    )


def analyse(
    updates: Sequence[Tensors], r0: float = R0, delta: float = DELTA, *, names: Sequence[str] | None = None
) -> Analysis:
    """Analyse a round's updates, Eq. 5-7 and 10.

    Args:
        updates: For each client, its trained minus the global parameters; the same names, shapes and dtypes.
        r0: Share that the least heterogeneous client keeps.
        delta: How much less the most heterogeneous client keeps.
        names: The clients' names.

    Raises:
        UsageError: there is no update, or another number of names than of updates.
        ArtifactError: an update differs from the first in names, shapes or dtypes, or holds NaN or Inf.

    Example:
        >>> analyse([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 0.0])}]).weights
        [0.5, 0.5]
    """
    return describe(measure(updates, names), r0, delta)


def conflict_pieces(
    updates: Sequence[Tensors], chunk_elements: int = CHUNK_ELEMENTS
) -> Iterator[tuple[Span, torch.Tensor]]:
    """Conflict, Eq. 7, span by span in order: C_p = 1 - |Σ_k sign τ_k,p| / K, float32; 0 for a single client."""
    for spans, values in stacked(updates, chunk_elements):
        levels = _disagreement(values).float() / len(values)
        yield from zip(spans, levels.split_with_sizes([span.stop - span.start for span in spans]), strict=True)


def conflict(updates: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """Conflict of every coordinate, Eq. 7: C_p = 1 - |Σ_k sign τ_k,p| / K; 0 for a single client.

    Args:
        updates: One mapping a client; the same names and shapes.

    Returns:
        Name → float32 tensor of the update's shape, in 0 (all agree) ... 1 (as many up as down).

    Raises:
        UsageError: there is no update.
        ArtifactError: an update differs from the first in names, shapes or dtypes.
    """
    check_updates(updates, None)
    result = {
        name: torch.empty(t.shape, dtype=torch.float32, device=t.device) for name, t in outlines(updates[0]).items()
    }
    for span, piece in conflict_pieces(updates):
        span.of(result).copy_(piece)
    return result
