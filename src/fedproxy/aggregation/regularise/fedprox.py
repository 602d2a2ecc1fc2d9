"""FedProx: every coordinate is drawn back to the global value."""

import torch

from fedproxy.aggregation.regularise.contract import Regulariser
from fedproxy.aggregation.regularise.squares import squared_distance
from fedproxy.tensors import Tensors


def fedprox(parameters: Tensors, anchor: Tensors, conflict: Tensors | None, strength: float) -> torch.Tensor:
    """μ/2 · Σ_p (φ_p - φ_t,p)².

    Args:
        parameters: φ, the client's trainable tensors by name; gradients flow to them.
        anchor: φ_t, the global values that the round began with.
        conflict: Not used.
        strength: μ.

    Returns:
        A scalar, float32.

    Raises:
        ArtifactError: the anchor lacks a tensor, or holds it in another shape.

    Reference: Li et al., "Federated Optimization in Heterogeneous Networks", 2020, Eq. 2.
    """
    return strength / 2 * squared_distance(parameters, anchor)


FEDPROX = Regulariser("fedprox", strength=0.01, penalty=fedprox)
