"""Terms added to a client's loss. To add one: a file here with a `Penalty` function, and its row in `PENALTIES`."""

from collections.abc import Callable

import torch

from fedproxy.federation.choice import choose
from fedproxy.federation.regularise.fedprox import fedprox
from fedproxy.federation.regularise.pcr import pcr
from fedproxy.tensors import Tensors

__all__ = ["PENALTIES", "Penalty", "none", "penalty"]

Penalty = Callable[[Tensors, Tensors, Tensors | None, float], torch.Tensor]


def none(parameters: Tensors, anchor: Tensors, conflict: Tensors | None, strength: float) -> torch.Tensor:
    """No penalty: 0."""
    return torch.zeros((), device=next(iter(parameters.values())).device)


PENALTIES: dict[str, Penalty] = {"none": none, "fedprox": fedprox, "pcr": pcr}


def penalty(name: str) -> Penalty:
    """The penalty called `name`.

    Raises:
        UsageError: there is no such penalty.
    """
    return choose("regulariser", name, PENALTIES)
