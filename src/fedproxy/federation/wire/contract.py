"""What an encoding is: a frozen row of pure functions and a dataclass of options.

A part is one flat vector for all tensors together, laid one after the other in sorted name order: the header of a
message has an entry a part, however many tensors an adapter has.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from fedproxy.errors import ArtifactError
from fedproxy.tensors import Tensors, check_finite

Options = TypeVar("Options")
OptionsIn = TypeVar("OptionsIn", contravariant=True)
Parts = dict[str, torch.Tensor]
Shapes = Mapping[str, torch.Size]
Sizes = dict[str, tuple[torch.dtype, int]]
"""Name of a part → its dtype and its number of elements."""


class Encode(Protocol[OptionsIn]):
    """The parts that travel, each [elements]; see `Encoding`."""

    def __call__(self, tensors: Tensors, options: OptionsIn, /, *, seed: int, share: float) -> Parts:
        """Encode the tensors."""


class Decode(Protocol[OptionsIn]):
    """The tensors, one after the other; see `Encoding`."""

    def __call__(
        self, parts: Tensors, shapes: Shapes, options: OptionsIn, who: str, /, *, share: float
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Decode the parts."""


class Layout(Protocol[OptionsIn]):
    """The parts that can come, and the most elements of each; see `Encoding`."""

    def __call__(self, shapes: Shapes, options: OptionsIn, /, *, share: float) -> Sizes:
        """Bound the parts."""


@dataclass(frozen=True)
class Encoding(Generic[Options]):
    """A way to write an update for the wire.

    Attributes:
        name: Its name in configurations.
        options: Frozen dataclass of its options with defaults (float or Literal fields); it checks their values.
        encode: Tensors of floating point, the options, a seed and the round's share → the parts. An encoding that
            rounds at random draws from seed, tensor name and index alone: give every client and round its own seed. One
            that sends a part of the coordinates sends this share of them, unless its options say otherwise. Raises
            ArtifactError for NaN and Inf.
        decode: Parts, the tensors' shapes, the options, who sent them and the round's share → name and float32 tensor,
            in sorted name order. Names, types and sizes of the parts are checked at the call, the values of a tensor
            before it is given. Raises ArtifactError.
        layout: The tensors' shapes, the options and the round's share → dtype and most elements of every part.
        loses: Whether values come back changed: what was lost then is added to the client's next update.
        by_share: Whether it sends the share that the round sets; such a one is for updates, not for adapters.
        plain: Whether tensors that are to travel in it travel as they are, without parts.
    """

    name: str
    options: type[Options]
    encode: Encode[Options]
    decode: Decode[Options]
    layout: Layout[Options]
    loses: bool = True
    by_share: bool = False
    plain: bool = False


@dataclass(frozen=True)
class Code:
    """A way to write a run of values: the sizes of its parts follow from the number of values.

    Attributes:
        sizes: Number n of values → dtype and elements of every part. Elements are some n / d, rounded up.
        encode: Finite values [n], float32, and the key of the draws → the parts.
        decode: Parts of exactly these sizes, n, and what they are, for the error → values [n], float32, all finite.
            Raises ArtifactError.
    """

    sizes: Callable[[int], Sizes]
    encode: Callable[[torch.Tensor, int], Parts]
    decode: Callable[[Tensors, int, str], torch.Tensor]


def finite_vectors(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Every tensor flattened, as float32 on the CPU, in sorted name order; a view where it is that already.

    Raises:
        ArtifactError: a value is NaN, or infinite in float32.
    """
    vectors = {name: tensors[name].detach().to("cpu", torch.float32).reshape(-1) for name in sorted(tensors)}
    check_finite(vectors, "the update")
    return vectors


def joined(runs: list[Parts], sizes: Sizes) -> Parts:
    """The parts of all runs, one after the other; `sizes` names the parts and their types."""
    return {
        part: torch.cat([torch.empty(0, dtype=dtype), *(run[part] for run in runs)])
        for part, (dtype, _) in sizes.items()
    }


def total_sizes(code: Code, counts: list[int]) -> Sizes:
    """Dtype and elements of every part of runs of so many values."""
    runs = [code.sizes(count) for count in counts]
    return {part: (dtype, sum(run[part][1] for run in runs)) for part, (dtype, _) in code.sizes(0).items()}


def check_parts(parts: Tensors, limits: Sizes, who: str, *, exact: bool) -> None:
    """Check that there are exactly the parts of `limits`, flat, of their types, and of their sizes.

    Args:
        parts: What came.
        limits: Dtype and elements of every part.
        who: Whose parts they are, for the error.
        exact: Whether a part must have all of its elements; else it may have fewer.

    Raises:
        ArtifactError: a part is missing, unknown, of another type, or of a wrong size.
    """
    for part in sorted(limits.keys() ^ parts.keys()):
        raise ArtifactError(
            f"{who}: the part {part!r:.100} is {'missing' if part in limits else 'unknown'}; expected "
            f"{', '.join(limits)}."
        )
    for part, (dtype, most) in limits.items():
        came = parts[part]
        fits = came.dim() == 1 and (came.numel() == most if exact else came.numel() <= most)
        if came.dtype != dtype or not fits:
            raise ArtifactError(
                f"{who}: the part {part} is {came.dtype} {list(came.shape)}, expected {dtype} "
                f"[{'' if exact else 'at most '}{most}]."
            )


def decoded_runs(code: Code, parts: Tensors, counts: Mapping[str, int], who: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The runs whose parts lie one after the other in `parts`, of checked sizes.

    Each run takes its parts anew, so that of mapped ones a run's bytes are resident at a time.

    Args:
        code: How they are written.
        parts: Parts of the sizes `total_sizes` gives.
        counts: Name → number of values, in the order in which they lie.
        who: Whose they are, for the error.

    Raises:
        ArtifactError: a value is none that the code writes.
    """
    position = dict.fromkeys(code.sizes(0), 0)
    for name, count in counts.items():
        run = {}
        for part, (_, elements) in code.sizes(count).items():
            run[part] = parts[part][position[part] : position[part] + elements]
            position[part] += elements
        yield name, code.decode(run, count, f"{who}: {name}")
