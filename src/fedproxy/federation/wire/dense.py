"""Encodings that send all values: a code of a run of values, applied to every tensor."""

from collections.abc import Callable, Iterator
from math import prod

import torch

from fedproxy.federation.wire.contract import (
    Code,
    Encoding,
    Options,
    Parts,
    Shapes,
    Sizes,
    check_parts,
    decoded_runs,
    finite_vectors,
    joined,
    total_sizes,
)
from fedproxy.seeds import derive_seed
from fedproxy.tensors import Tensors


def dense(name: str, options: type[Options], code: Callable[[Options], Code]) -> Encoding[Options]:
    """The encoding that writes every tensor with a code.

    Args:
        name: Its name.
        options: Dataclass of its options.
        code: The options → the code.
    """

    def encode(tensors: Tensors, chosen: Options, *, seed: int, share: float) -> Parts:
        row = code(chosen)
        vectors = finite_vectors(tensors)
        runs = [row.encode(values, derive_seed(seed, "wire", name)) for name, values in vectors.items()]
        return joined(runs, row.sizes(0))

    def decode(
        parts: Tensors, shapes: Shapes, chosen: Options, who: str, *, share: float
    ) -> Iterator[tuple[str, torch.Tensor]]:
        check_parts(parts, layout(shapes, chosen, share=share), who, exact=True)
        counts = {name: prod(shapes[name]) for name in sorted(shapes)}
        runs = decoded_runs(code(chosen), parts, counts, who)
        return ((name, values.view(shapes[name])) for name, values in runs)

    def layout(shapes: Shapes, chosen: Options, *, share: float) -> Sizes:
        return total_sizes(code(chosen), [prod(shape) for shape in shapes.values()])

    return Encoding(name, options, encode, decode, layout)
