"""A and B apart: the update itself is what is merged, as published."""

import torch

from fedproxy.aggregation.space.contract import Space
from fedproxy.tensors import Tensors, check_layout


def update_of(given: Tensors, update: Tensors) -> Tensors:
    """τ_k = φ_k - φ_t.

    Args:
        given: The adapter that the client was given.
        update: τ_k.

    Returns:
        The update.

    Raises:
        ArtifactError: the update has not the adapter's layout.
    """
    check_layout(given, update, "an update")
    return update


def added(adapter: Tensors, merged: Tensors) -> dict[str, torch.Tensor]:
    """φ_{t+1} = φ_t + merged.

    Args:
        adapter: φ_t.
        merged: The merged update.

    Returns:
        φ_{t+1}, in the adapter's dtypes.

    Raises:
        ArtifactError: the merged update has not the adapter's layout.

    Reference: FedProxy (arXiv 2604.19015), after Eq. 14.
    """
    check_layout(adapter, merged, "the merged update")
    return {name: tensor + merged[name] for name, tensor in adapter.items()}


FACTORS = Space(name="factors", trains=lambda name: True, vector=update_of, apply=added, for_rank=None, lasting=True)
