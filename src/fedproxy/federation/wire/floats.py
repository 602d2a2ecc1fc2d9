"""Values as floating point numbers: float32 as they are, or bfloat16, the nearest, ties to even."""

from dataclasses import dataclass, replace

import torch

from fedproxy.errors import ArtifactError
from fedproxy.federation.wire.contract import Code, Parts, Sizes
from fedproxy.federation.wire.dense import dense
from fedproxy.tensors import Tensors


@dataclass(frozen=True)
class FloatOptions:
    """`fp32` and `bf16` have no options."""


def floats(dtype: torch.dtype) -> Code:
    """The code that writes each value in `dtype`; what lies beyond its largest number becomes that."""
    largest = torch.finfo(dtype).max

    def sizes(count: int) -> Sizes:
        return {"values": (dtype, count)}

    def encode(values: torch.Tensor, key: int) -> Parts:
        return {"values": values if dtype == torch.float32 else values.clamp(-largest, largest).to(dtype)}

    def decode(parts: Tensors, count: int, where: str) -> torch.Tensor:
        values = parts["values"].float()
        if not values.isfinite().all():
            raise ArtifactError(f"{where} holds a NaN or Inf. Leave this update out.")
        return values

    return Code(sizes, encode, decode)


FP32 = replace(dense("fp32", FloatOptions, lambda options: floats(torch.float32)), loses=False, plain=True)
BF16 = dense("bf16", FloatOptions, lambda options: floats(torch.bfloat16))
