"""The sum of squared distances that the penalties share."""

import torch

from fedproxy.errors import ArtifactError
from fedproxy.tensors import Tensors


def squared_distance(parameters: Tensors, anchor: Tensors, factors: Tensors | None = None) -> torch.Tensor:
    """Σ_p f_p (φ_p - a_p)², accumulated in float32.

    Args:
        parameters: φ, by name; gradients flow to them.
        anchor: a; it must hold every name of `parameters`, in the same shape.
        factors: f, likewise; 1 without.

    Returns:
        A scalar, float32.

    Raises:
        ArtifactError: the anchor or the factors lack a tensor, or hold it in another shape.
    """
    terms = []
    for name, value in parameters.items():
        for held, what in ((anchor, "anchor"), (factors, "conflict")):
            if held is not None and (name not in held or held[name].shape != value.shape):
                raise ArtifactError(f"The {what} holds no tensor {name} of shape {list(value.shape)}.")
        square = (value.float() - anchor[name].detach().float()).square()
        terms.append((square if factors is None else square * factors[name].detach()).sum())
    return torch.stack(terms).sum()
