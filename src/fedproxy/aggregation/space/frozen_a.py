"""FFA-LoRA: A stays as initialised, so the product is linear in what trains, and the mean of B is that of B·A."""

import torch

from fedproxy.aggregation.space.contract import Space
from fedproxy.aggregation.space.factors import added, update_of
from fedproxy.aggregation.space.pairs import B_SUFFIX
from fedproxy.tensors import Tensors


def _trains(name: str) -> bool:
    return name.endswith(B_SUFFIX)


def _b_of(adapter: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in adapter.items() if _trains(name)}


def update_of_b(given: Tensors, update: Tensors) -> Tensors:
    """The update, of the tensors of B alone.

    Args:
        given: The whole adapter that the client was given.
        update: B_k - B_t of every layer.

    Returns:
        The update.

    Raises:
        ArtifactError: a tensor of B is missing or of another shape or dtype, or there is another tensor.
    """
    return update_of(_b_of(given), update)


def added_to_b(adapter: Tensors, merged: Tensors) -> dict[str, torch.Tensor]:
    """B_{t+1} = B_t + merged, and A as it is.

    Args:
        adapter: φ_t.
        merged: The merged update of B.

    Returns:
        φ_{t+1}.

    Raises:
        ArtifactError: the merged update has not the layout of the adapter's tensors of B.

    Reference: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", 2024 (arXiv 2403.12313).
    """
    return {**adapter, **added(_b_of(adapter), merged)}


FROZEN_A = Space(name="frozen-a", trains=_trains, vector=update_of_b, apply=added_to_b, for_rank=None, lasting=True)
