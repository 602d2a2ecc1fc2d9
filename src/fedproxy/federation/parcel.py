"""Tensors in the encoding that they travel in: updates with error feedback, adapters as what moved since the start."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedproxy.federation.wire import encoding, feedback
from fedproxy.tensors import Tensors


@dataclass(frozen=True)
class Parcel:
    """Encoded tensors.

    Attributes:
        encoding: The encoding's name.
        options: Its options, as an experiment gives them.
        share: Share of the coordinates that were sent, where the encoding leaves some out.
        parts: What its `encode` made of the tensors.
    """

    encoding: str
    options: Mapping[str, Any]
    share: float
    parts: Tensors

    def open(self, like: Tensors, who: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Decode, one tensor after the other in sorted order of their names, float32.

        Args:
            like: Tensors of the layout that was encoded.
            who: Whose it is, for the error.

        Raises:
            ArtifactError: the parts are malformed.
        """
        row, options = encoding(self.encoding, self.options)
        shapes = {name: tensor.shape for name, tensor in like.items()}
        return row.decode(self.parts, shapes, options, who, share=self.share)


def wrap_update(
    update: Tensors, residual: Tensors | None, name: str, given: Mapping[str, Any], *, seed: int, share: float
) -> tuple[Parcel | None, Tensors, Tensors | None]:
    """Encode a client's update and what was lost of those before.

    Args:
        update: τ_k.
        residual: What was lost so far; none at first.
        name: The encoding.
        given: Its options.
        seed: Of its rounding.
        share: Share of the coordinates that an encoding sends that goes by it.

    Returns:
        What travels, none if the update itself does; the update that the server reads out of it; what is lost now.
    """
    row, options = encoding(name, given)
    if row.plain:
        return None, update, None
    parts, decoded, lost = feedback(update, residual, row, options, seed=seed, share=share)
    return Parcel(name, given, share, parts), decoded, lost if row.loses else None


def wrap_adapter(adapter: Tensors, start: Tensors, name: str, *, seed: int) -> tuple[Parcel | None, Tensors]:
    """Encode an adapter as its difference from the one that the run began with, which the clients draw themselves.

    Args:
        adapter: φ_t.
        start: φ_1.
        name: The encoding.
        seed: Of its rounding.

    Returns:
        What travels, none if the adapter itself does, and the adapter that clients read out of it.
    """
    row, options = encoding(name, {})
    if row.plain:
        return None, adapter
    moved = {key: tensor - start[key] for key, tensor in adapter.items()}
    parcel = Parcel(name, {}, 1.0, row.encode(moved, options, seed=seed, share=1.0))
    return parcel, open_adapter(parcel, start, "the adapter")


def open_adapter(parcel: Parcel, start: Tensors, who: str) -> dict[str, torch.Tensor]:
    """The adapter that `wrap_adapter` encoded.

    Raises:
        ArtifactError: the parts are malformed.
    """
    return {name: start[name] + moved for name, moved in parcel.open(start, who)}
