"""A frozen linear layer with its LoRA adapter as one function of autograd, for training on a CPU.

PEFT narrows the frozen weight at every step and the input twice for every layer, multiplies and adds the adapter's
output in passes of their own, and draws dropout's mask from a generator that takes eight times as long as the layer's
matrix product. Here weights are narrowed once a training, layers that read the same input share it and its mask, and
B's product is added inside the matrix product. The outcome is PEFT's up to the rounding of the data type; with dropout
in distribution, but for the shared mask.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedproxy.models.families import stored_transposed
from fedproxy.models.lora import AdaptedModel

_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
"""The integers as wide as a number, in which a mask of 0 and 1 keeps its bits or clears them."""
_ADAPTER = "default"


def keep_mask(shape: torch.Size, dropout: float) -> torch.Tensor:
    """Draw what dropout keeps: 1 for kept, 0 for dropped, int16, from a seed that torch's global generator gives.

    Args:
        shape: The mask's.
        dropout: The probability of 0, to the nearest 1/65536.
    """
    seed = int(torch.randint(1 << 62, ()))
    count = shape.numel()
    drawn = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16)[:count]
    return torch.from_numpy(drawn).ge_(round(dropout * 65536) - 32768).view(shape)


def masked(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A tensor, 0 where its mask is 0."""
    if mask is None:
        return tensor
    bits = _BITS[tensor.dtype]
    return (tensor.view(bits) * mask.to(bits)).view(tensor.dtype)


class _Adapted(torch.autograd.Function):
    """x Wᵀ + bias + s · (x ∘ mask) Aᵀ Bᵀ and its gradients; x is [tokens, inputs], W and bias are frozen.

    `left`, x ∘ mask without a gradient, comes ready-made, since several layers have the same.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        left: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        inner = (left @ a.t()).mul_(scale)
        out = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        ctx.save_for_backward(left, inner, weight, a, b, mask)
        ctx.scale = scale
        return out.addmm_(inner, b.t())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [grad] = grads
        left, inner, weight, a, b, mask = ctx.saved_tensors
        of_x, _, _, _, of_a, of_b, _, _ = ctx.needs_input_grad
        of_inner = (grad @ b).mul_(ctx.scale)
        x = None
        if of_x:
            x = grad @ weight
            if mask is None:
                x.addmm_(of_inner, a)
            else:
                x.add_(masked(of_inner @ a, mask))
        return (
            x,
            None,
            None,
            None,
            (of_inner.t() @ left).float() if of_a else None,
            (grad.t() @ inner).float() if of_b else None,
            None,
            None,
        )


class _Inputs:
    """What layers that read the same tensor share: it as [tokens, width], what dropout leaves of it, and the mask."""

    def __init__(self) -> None:
        self._of: Callable[[], torch.Tensor | None] = lambda: None
        self._version, self._dropout = -1, 0.0
        self._made: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]

    def of(
        self, x: torch.Tensor, dtype: torch.dtype, dropout: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Make all three, or give what the layer before had made of the same input."""
        if self._of() is not x or (self._version, self._dropout) != (x._version, dropout):
            narrow = x.to(dtype).reshape(-1, x.shape[-1])
            mask = keep_mask(narrow.shape, dropout) if dropout else None
            self._made = narrow, masked(narrow.detach(), mask), mask
            self._of, self._version, self._dropout = weakref.ref(x), x._version, dropout
        return self._made


def _is_plain(layer: Any) -> bool:
    """Whether a layer is PEFT's plain LoRA on a frozen linear layer with float32 weights."""
    return (
        type(layer) is lora.Linear
        and type(layer.base_layer) in (nn.Linear, Conv1D)
        and layer.active_adapters == [_ADAPTER]
        and not (layer.merged or layer.lora_variant or layer.lora_bias[_ADAPTER])
        and _is_frozen(layer.base_layer)
    )


def _is_frozen(layer: Any) -> bool:
    return layer.weight.dtype == torch.float32 and not any(one.requires_grad for one in layer.parameters())


@contextlib.contextmanager
def in_few_passes(model: AdaptedModel, dtype: torch.dtype, *, once: bool) -> Iterator[None]:
    """Let the linear layers of a model compute as the module says, for a while; other layers are left as they are.

    Args:
        model: A model on a CPU, with float32 weights and a plain LoRA adapter.
        dtype: What autocast narrows matrix products to; float32 without it.
        once: Narrow each frozen weight once, which takes memory as long as the context lasts; else at every use.
    """
    inputs, autocast = _Inputs(), dtype != torch.float32

    def frozen(weight: torch.Tensor | None) -> Callable[[], torch.Tensor | None]:
        held = None if weight is None else weight.detach()
        if once and held is not None:
            held = held.to(dtype)
        return lambda: None if held is None else held.to(dtype)

    def adapted(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        base = layer.base_layer
        weight, bias = frozen(base.weight.t() if stored_transposed(base) else base.weight), frozen(base.bias)
        named = (layer.lora_A, layer.lora_B, layer.scaling, layer.lora_dropout)
        a, b, scale, drop = (part[_ADAPTER] for part in named)

        def forward(x: torch.Tensor) -> torch.Tensor:
            dropout = drop.p if isinstance(drop, nn.Dropout) and layer.training else 0.0
            rows, left, mask = inputs.of(x, dtype, dropout)
            parts = (rows, left, weight(), bias(), a.weight, b.weight, scale / (1 - dropout), mask)
            out: Any = _Adapted.apply(*parts)  # type: ignore[no-untyped-call]
            found: torch.Tensor = out.view(*x.shape[:-1], -1)
            return found

        return forward

    def plain(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        weight: Any = frozen(layer.weight)
        bias = frozen(layer.bias)
        return lambda x: F.linear(x.to(dtype), weight(), bias())

    changed: list[nn.Module] = []

    def change(layer: nn.Module, faster: Callable[[torch.Tensor], torch.Tensor]) -> None:
        usual = layer.forward
        layer.forward = lambda x: (faster if torch.is_autocast_enabled("cpu") == autocast else usual)(x)
        changed.append(layer)

    def visit(layer: nn.Module) -> None:
        if _is_plain(layer):
            change(layer, adapted(layer))
        elif type(layer) is nn.Linear and autocast and once and _is_frozen(layer):
            change(layer, plain(layer))
        elif not isinstance(layer, lora.LoraLayer):
            for child in layer.children():
                visit(child)

    visit(model)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward
