"""The pairs of LoRA in an adapter, by layer."""

import torch

from fedproxy.errors import ArtifactError
from fedproxy.tensors import Tensors

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


def layers(adapter: Tensors) -> list[str]:
    """The names of the layers that the adapter holds a pair for, sorted.

    Raises:
        ArtifactError: a tensor is no half of a pair, or the halves do not fit: A must be [r, n] and B [m, r].
    """
    found = sorted({name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX) for name in adapter})
    for layer in found:
        halves = [adapter.get(layer + suffix) for suffix in (A_SUFFIX, B_SUFFIX)]
        if layer in adapter or any(half is None or half.dim() != 2 for half in halves):
            raise ArtifactError(
                f"{layer}: the adapter holds no pair of matrices {A_SUFFIX[1:]} and {B_SUFFIX[1:]} for it. Only pairs "
                "of LoRA have a product; choose the space factors."
            )
        a, b = pair(adapter, layer)
        if b.shape[1] != a.shape[0]:
            raise ArtifactError(
                f"{layer}: lora_B has {b.shape[1]} columns, lora_A {a.shape[0]} rows; both are the rank."
            )
    return found


def pair(adapter: Tensors, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, n] and B [m, r] of a layer."""
    return adapter[layer + A_SUFFIX], adapter[layer + B_SUFFIX]
