"""The entries of largest magnitude alone: where they are, and their values in a code of their own.

Kept are the floor(share · P) entries of largest magnitude over the whole vector of P values, ties to the lower index:
step (a) of H-TIES (FedProxy, Eq. 11), done by the client. Everything else comes back as zero.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from fedproxy.aggregation.merge.top_k import Threshold, kept_count, magnitude_bits, thresholds
from fedproxy.errors import ArtifactError
from fedproxy.federation.wire.blockwise import Block, blockwise
from fedproxy.federation.wire.contract import (
    Code,
    Encoding,
    Parts,
    Shapes,
    Sizes,
    check_parts,
    decoded_runs,
    finite_vectors,
    joined,
    total_sizes,
)
from fedproxy.federation.wire.floats import floats
from fedproxy.federation.wire.packing import pack, packed_bytes, unpack
from fedproxy.federation.wire.positions import decode_positions, encode_positions, most_position_bytes, position_bytes
from fedproxy.registry import require_range
from fedproxy.seeds import derive_seed
from fedproxy.tensors import Tensors

_COUNTS, _POSITIONS = "counts", "positions"


@dataclass(frozen=True)
class TopKOptions:
    """Options of `top-k`.

    Attributes:
        share: Share of the coordinates to keep; 0 keeps the round's.
        values: How the kept values are written.
        block: Kept values that share a step, where they are written in steps.
    """

    share: float = 0.0
    values: Literal["fp32", "bf16", "int8", "int4"] = "int8"
    block: Block = 128

    def __post_init__(self) -> None:
        require_range("top-k", "share", self.share, 0.0, 1.0)


def encode(tensors: Tensors, options: TopKOptions, *, seed: int, share: float) -> Parts:
    """Write what is kept; see `Encoding`.

    Returns:
        How many of each tensor's values are kept, packed; their positions; and the parts of their code, a run a tensor.
    """
    code = _code(options)
    vectors = finite_vectors(tensors)
    total = sum(len(values) for values in vectors.values())
    [limit] = thresholds([vectors], [kept_count(options.share or share, total)]) if total else [None]
    counts: list[int] = []
    positions: list[torch.Tensor] = []
    runs: list[Parts] = []
    for name, kept in _kept(vectors, limit):
        values = vectors[name][kept]
        counts.append(len(values))
        positions.append(encode_positions(kept))
        runs.append(code.encode(values, derive_seed(seed, "wire", name)))
    return {
        _COUNTS: pack(torch.tensor(counts, dtype=torch.int64), _count_bits([len(v) for v in vectors.values()])),
        _POSITIONS: torch.cat([torch.empty(0, dtype=torch.uint8), *positions]),
        **joined(runs, code.sizes(0)),
    }


def _kept(vectors: Mapping[str, torch.Tensor], limit: Threshold | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Of each vector, in sorted name order, what a threshold keeps: [n], bool."""
    left = limit.ties if limit else 0
    for name, values in vectors.items():
        if limit is None:
            yield name, torch.ones(len(values), dtype=torch.bool)
            continue
        bits = magnitude_bits(values)
        kept = bits > limit.bits
        if left:
            tied = (bits == limit.bits).nonzero().view(-1)[:left]
            kept[tied] = True
            left -= len(tied)
        yield name, kept


def decode(
    parts: Tensors, shapes: Shapes, options: TopKOptions, who: str, *, share: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read what is kept, zero elsewhere; see `Encoding`. Fewer entries than the share are taken, more are not."""
    code = _code(options)
    check_parts(parts, layout(shapes, options, share=share), who, exact=False)
    totals = {name: prod(shapes[name]) for name in sorted(shapes)}
    found = unpack(parts[_COUNTS], len(totals), _count_bits(totals.values()), f"{who}: {_COUNTS}").tolist()
    counts = dict(zip(totals, found, strict=True))
    for name, count in counts.items():
        if count > totals[name]:
            raise ArtifactError(f"{who}: {name} has {totals[name]} values, {count} are said to be kept.")
    most = kept_count(options.share or share, sum(totals.values()))
    if sum(found) > most:
        raise ArtifactError(f"{who}: {sum(found)} values are kept, the share allows {most}.")
    places = {name: position_bytes(count, totals[name]) for name, count in counts.items()}
    sizes = {
        _COUNTS: (torch.uint8, len(parts[_COUNTS])),
        _POSITIONS: (torch.uint8, sum(places.values())),
        **total_sizes(code, found),
    }
    check_parts(parts, sizes, who, exact=True)
    return _restored(code, parts, shapes, counts, places, who)


def _restored(
    code: Code, parts: Tensors, shapes: Shapes, counts: Mapping[str, int], places: Mapping[str, int], who: str
) -> Iterator[tuple[str, torch.Tensor]]:
    start = 0
    for name, values in decoded_runs(code, parts, counts, who):
        packed = parts[_POSITIONS][start : start + places[name]]
        start += places[name]
        whole = torch.zeros(prod(shapes[name]))
        whole[decode_positions(packed, counts[name], len(whole), f"{who}: {name}")] = values
        yield name, whole.view(shapes[name])


def layout(shapes: Shapes, options: TopKOptions, *, share: float) -> Sizes:
    """The parts and the most elements of each; see `Encoding`."""
    code = _code(options)
    totals = [prod(shape) for shape in shapes.values()]
    kept = kept_count(options.share or share, sum(totals))
    whole = total_sizes(code, totals)
    values = {
        part: (dtype, min(whole[part][1], elements + len(totals)))
        for part, (dtype, elements) in code.sizes(kept).items()
    }  # a run's parts are rounded up, which adds less than an element
    return {
        _COUNTS: (torch.uint8, packed_bytes(len(totals), _count_bits(totals))),
        _POSITIONS: (torch.uint8, most_position_bytes(kept, totals)),
        **values,
    }


def _count_bits(totals: Collection[int]) -> int:
    """Bits of a count of kept values."""
    return max(totals, default=0).bit_length()


def _code(options: TopKOptions) -> Code:
    match options.values:
        case "fp32":
            return floats(torch.float32)
        case "bf16":
            return floats(torch.bfloat16)
        case "int8":
            return blockwise(8, options.block)
        case "int4":
            return blockwise(4, options.block)


TOP_K = Encoding("top-k", TopKOptions, encode, decode, layout, by_share=True)
