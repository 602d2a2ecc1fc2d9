"""What keeps clients together while they train: a term added to the loss, or SCAFFOLD's correction of the steps.

To add a term: a file here with a `Penalty` function, and its row in `PENALTIES`.
"""

from collections.abc import Callable

import torch

from fedproxy.aggregation.regularise.fedprox import fedprox
from fedproxy.aggregation.regularise.pcr import pcr
from fedproxy.registry import Axis, choose
from fedproxy.tensors import Tensors

__all__ = ["PCR", "PENALTIES", "REGULARISERS", "SCAFFOLD", "Penalty", "none", "penalty"]

Penalty = Callable[[Tensors, Tensors, Tensors | None, float], torch.Tensor]


def none(parameters: Tensors, anchor: Tensors, conflict: Tensors | None, strength: float) -> torch.Tensor:
    """No penalty: 0."""
    return torch.zeros((), device=next(iter(parameters.values())).device)


PENALTIES: dict[str, Penalty] = {"none": none, "fedprox": fedprox, "pcr": pcr}

PCR, SCAFFOLD = "pcr", "scaffold"
REGULARISERS: Axis[str] = Axis(
    "regulariser", "fedproxy.regularisers", str, {name: name for name in (*PENALTIES, SCAFFOLD)}
)
"""What an experiment may name."""


def penalty(name: str) -> Penalty:
    """The penalty called `name`.

    Raises:
        UsageError: there is no such penalty.
    """
    return choose("regulariser", name, PENALTIES)
