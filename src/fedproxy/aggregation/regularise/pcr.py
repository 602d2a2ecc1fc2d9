"""Parameter conflict regularisation: coordinates that clients dispute are drawn back to the global value."""

import torch

from fedproxy.aggregation.regularise.contract import Regulariser
from fedproxy.aggregation.regularise.squares import squared_distance
from fedproxy.tensors import Tensors


def pcr(parameters: Tensors, anchor: Tensors, conflict: Tensors | None, strength: float) -> torch.Tensor:
    """λ · Σ_p C_p (φ_p - φ_t,p)².

    Args:
        parameters: φ, the client's trainable tensors by name; gradients flow to them.
        anchor: φ_t, the global values that the round began with.
        conflict: C of the round before, in 0 ... 1; none in the first round, which means 0.
        strength: λ.

    Returns:
        A scalar, float32; 0 without conflict.

    Raises:
        ArtifactError: the anchor or the conflict lacks a tensor, or holds it in another shape.

    Reference: FedProxy (arXiv 2604.19015), Eq. 8-9 (docs/method.md). The paper's prose once says that agreed
    coordinates are held; we follow its formula: disputed ones are.
    """
    if conflict is None:
        return torch.zeros((), device=next(iter(parameters.values())).device)
    return strength * squared_distance(parameters, anchor, conflict)


PCR = Regulariser("pcr", strength=1e-5, penalty=pcr, conflict=True)
