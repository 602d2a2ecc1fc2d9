"""The gradients of a step: forward and backward through a model that is made ready for training."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fedproxy.config import Train
from fedproxy.models.encoding import Encoded
from fedproxy.models.label_loss import summed_loss
from fedproxy.models.layouts import layout_for
from fedproxy.models.lora import AdaptedModel
from fedproxy.models.lora_layer import in_few_passes
from fedproxy.models.precision import bf16_is_fast

Backward = Callable[[Sequence[Sequence[Encoded]], int], float]
"""Batches, and the number of tokens that their losses' sum is divided by → that loss; its gradients are added to the
parameters'."""
EAGER_ATTENTION_UP_TO = 256


def suit_attention(model: Any, usual: str, longest: int, device: torch.device) -> None:
    """Give the model the attention that suits a batch: on a CPU, short rows go without the fused one.

    There its backward pass costs more than the rest of the step.

    Args:
        model: The base model, changed.
        usual: The attention that it came with.
        longest: Tokens of the longest row.
        device: Where it is trained.
    """
    short = device.type == "cpu" and usual == "sdpa" and longest <= EAGER_ATTENTION_UP_TO
    wanted = "eager" if short else usual
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)


@contextlib.contextmanager
def in_training(
    model: AdaptedModel,
    settings: Train,
    pad: int,
    loss_of: Callable[[AdaptedModel, Mapping[str, torch.Tensor]], torch.Tensor] = summed_loss,
) -> Iterator[Backward]:
    """Put a model on its device into training state for a while; afterwards it is in evaluation state.

    Args:
        model: The model.
        settings: The [train] table.
        pad: Padding token id.
        loss_of: The loss of a batch as a layout makes it; by default the sum over the tokens that count.
    """
    base: Any = model.get_base_model()
    device = next(model.parameters()).device
    autocast = settings.precision == "bf16" or (settings.precision == "auto" and bf16_is_fast(device))
    usual = base.config._attn_implementation
    layout = layout_for(model, settings.padding_free)

    def backward(batches: Sequence[Sequence[Encoded]], count: int) -> float:
        loss = 0.0
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in layout(batch, pad).items()}
            suit_attention(base, usual, inputs["input_ids"].shape[1], device)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                part = loss_of(model, inputs) / count
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        return loss

    model.train()
    if settings.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    product = torch.bfloat16 if autocast else torch.float32
    once = not settings.gradient_checkpointing
    few = in_few_passes(model, product, once=once) if device.type == "cpu" else contextlib.nullcontext()
    try:
        with few:
            yield backward
    finally:
        if base.config._attn_implementation != usual:
            base.set_attn_implementation(usual)
        if settings.gradient_checkpointing:
            base.activation_checkpointing_disable()
        model.eval()
