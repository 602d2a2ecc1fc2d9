"""What an adapter does to the weights of a model: W + alpha / r * B A, a few rows at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from fedproxy.adapter_checks import is_lora, parameter_name
from fedproxy.adapter_files import scaling

_PIECE = 1 << 20
"""Values in a piece: 4 MiB in float32, the fastest of the sizes tried."""
_ROWS = 16
"""Pieces are of a multiple of so many rows, and the last is no shorter: matrix products of few rows round otherwise."""


@dataclass(frozen=True)
class LowRank:
    """A change by factor * B A.

    Attributes:
        a: A, [r, inputs].
        b: B, [outputs, r].
        factor: alpha / r of the adapter.
        transposed: The weight is stored as [inputs, outputs], as GPT-2's Conv1D does.
    """

    a: torch.Tensor
    b: torch.Tensor
    factor: float
    transposed: bool = False

    @property
    def bound(self) -> float:
        """A value that no entry of the change exceeds in magnitude: a row of B times a column of A at their longest."""
        rows, columns = self.b.float().norm(dim=1).max(), self.a.float().norm(dim=0).max()
        return abs(self.factor) * float(rows) * float(columns)


Change = LowRank | torch.Tensor
"""What is done to a weight: B A is added, or it becomes this tensor."""


def changes(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, Change]:
    """Return what an adapter does to a model, by the names of the weights in the model.

    Args:
        tensors: The adapter's tensors, named as in PEFT's `adapter_model.safetensors`.
        config: Its PEFT configuration.
    """
    found: dict[str, Change] = {}
    for name, tensor in tensors.items():
        if not is_lora(name):
            found[parameter_name(name)] = tensor
        elif ".lora_A." in name:
            other = tensors[name.replace(".lora_A.", ".lora_B.")]
            found[parameter_name(name)] = LowRank(
                tensor, other, scaling(config), transposed=bool(config.get("fan_in_fan_out"))
            )
    return found


def changed(weight: torch.Tensor, change: Change) -> torch.Tensor:
    """Return a changed weight, where W was and in its data type; W + factor * B A is computed in float32.

    Where B is zero, it is the same tensor.

    Reference:
        FedProxy, Eq. 15. The task vector is added; overwriting the block would be the same only as long as the proxy
        block started as the LLM block.
    """
    if isinstance(change, torch.Tensor):
        return change.to(weight.device, weight.dtype)
    if not bool(change.b.any()):
        return weight
    result = torch.empty_like(weight)
    change = replace(change, a=change.a.to(weight.device), b=change.b.to(weight.device))
    for rows in row_slices(tuple(weight.shape)):
        result[rows] = changed_rows(weight[rows], change, rows)
    return result


def changed_rows(
    weight: torch.Tensor, change: LowRank, rows: slice, scratch: torch.Tensor | None = None
) -> torch.Tensor:
    """Return some rows of W + factor * B A, in float32.

    The product is rounded, then multiplied by the factor, then added to W: the very operations of PEFT's merge.

    Args:
        weight: Those rows of W.
        change: B, A and the factor, on the device of W.
        rows: Which rows they are.
        scratch: Memory to work in, float32 [2, at least as many values]; the result lies in it.
    """
    if scratch is None:
        scratch = torch.empty(2, weight.numel(), device=weight.device)
    product, wide = (memory[: weight.numel()].view(weight.shape) for memory in scratch)
    a, b = change.a.float(), change.b.float()
    if change.transposed:
        product.copy_((b @ a[:, rows]).T)
    else:
        torch.mm(b[rows], a, out=product)
    return torch.add(product.mul_(change.factor), wide.copy_(weight), out=product)


def row_slices(shape: tuple[int, ...]) -> list[slice]:
    """Cut a matrix into pieces of full rows that stay in the processor's cache while they are worked on.

    A product of such rows has the bits of the rows of the whole product.
    """
    count, width = shape[0], max(1, prod(shape[1:]))
    step = max(_ROWS, _PIECE // width // _ROWS * _ROWS)
    starts = list(range(0, count, step))
    if len(starts) > 1 and count - starts[-1] < _ROWS:
        starts.pop()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=False)]
