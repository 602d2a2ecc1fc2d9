"""The gradient of every row of a batch by itself, in one backward pass: of the linear layers of a LoRA adapter.

Each layer computes what it did before. On the way back it keeps, in place of its weight's gradient, the product of the
outputs' gradients and the inputs for each row alone. With the ranks of LoRA that takes less memory than the inputs do.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from fedproxy.errors import UsageError
from fedproxy.models.encoding import Encoded
from fedproxy.models.label_loss import row_means
from fedproxy.models.layouts import collate
from fedproxy.models.lora import AdaptedModel, adapter_parameters

_ROUNDING, _COARSE_ROUNDING = 1e-3, 0.1
"""Difference of gradients that rounding explains, relative to their size: in float32, and in narrower numbers."""
Kept = Callable[[torch.Tensor, torch.Tensor], None]
"""Told the gradients of a layer's outputs and its inputs, both [..., values]."""


class _Linear(torch.autograd.Function):
    """A linear layer without bias whose weight gets no gradient: who is told makes one of each row."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, kept: Kept) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.kept = kept
        return F.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        [gradient] = gradients
        inputs, weight = ctx.saved_tensors
        ctx.kept(gradient, inputs)
        return (gradient @ weight.to(gradient.dtype)).to(inputs.dtype) if ctx.needs_input_grad[0] else None, None, None


def _linear(weight: torch.Tensor, kept: Kept, inputs: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _Linear.apply(inputs, weight, kept)  # type: ignore[no-untyped-call]
    return found


class RowGradients:
    """What a backward pass leaves.

    Attributes:
        rows: Number of rows of the batch that is computed next.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._found: dict[str, torch.Tensor] = {}

    def keep(self, name: str, gradient: torch.Tensor, inputs: torch.Tensor) -> None:
        """Take what the layer of a parameter says; one that is called several times adds up."""
        # some models hand rows of tokens on as tokens, one row's behind the other's
        out, into = (tensor.float().reshape(self.rows, -1, tensor.shape[-1]) for tensor in (gradient, inputs))
        one = torch.einsum("rto,rti->roi", out, into)
        self._found[name] = self._found[name] + one if name in self._found else one

    def take(self) -> dict[str, torch.Tensor]:
        """The gradients since the last call, float32 [rows, *shape], of the parameters that had a part in the loss."""
        found, self._found = self._found, {}
        return found


@contextlib.contextmanager
def rows_apart(model: AdaptedModel) -> Iterator[RowGradients]:
    """Let the adapter's trained parameters get a gradient for each row, for a while.

    PEFT's layers compute as PEFT has it meanwhile: a layer that was made faster calls A and B not as layers.

    Raises:
        UsageError: what is trained is no linear layer.
    """
    names = {id(parameter): name for name, parameter in adapter_parameters(model).items() if parameter.requires_grad}
    layers: dict[str, Any] = {}
    for module in model.modules():
        if id(getattr(module, "weight", None)) in names:
            layers[names[id(module.weight)]] = module
    odd = sorted(name for name, layer in layers.items() if type(layer) is not nn.Linear or layer.bias is not None)
    if odd or len(layers) < len(names):
        raise UsageError(f"[train.privacy] needs adapters of linear layers without bias; {odd[:1]} is another.")
    found = RowGradients()
    for name, layer in layers.items():
        kept = partial(found.keep, name)
        layer.forward = partial(_linear, layer.weight, kept)
    faster = {layer: layer.__dict__.pop("forward") for layer in _wrapped(model) if "forward" in layer.__dict__}
    try:
        yield found
    finally:
        for layer in layers.values():
            del layer.forward
        for layer, forward in faster.items():
            layer.forward = forward


def _wrapped(model: AdaptedModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def check_rows_apart(model: AdaptedModel, found: RowGradients) -> list[str]:
    """Try whether the gradients of rows that share a batch are those of each row alone.

    Three rows of random tokens are tried, with adapter values that are not zero; the values are put back. A model is
    found out in which rows meet, or which hands its tokens on in an order of its own, as experts do.

    Returns:
        The parameters that text reaches, sorted; in a model of text and pictures those of the pictures are none.

    Raises:
        UsageError: they are not, or a parameter gets its gradient in another way.
    """
    base: Any = model.get_base_model()
    vocabulary, device = base.get_input_embeddings().num_embeddings, next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    three = [Encoded(torch.randint(vocabulary, (n,), generator=generator).tolist(), 1) for n in (9, 5, 4)]
    parameters = adapter_parameters(model)
    for parameter in parameters.values():
        parameter.grad = None
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    training = model.training
    model.eval()  # no dropout
    try:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(device))
        try:
            batched = _gradients(model, found, three, device)
        except RuntimeError as error:
            raise UsageError(_mixed(model)) from error
        alone = [_gradients(model, found, [one], device) for one in three]
    finally:
        model.train(training)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
    fine = base.dtype.itemsize >= 4 and not getattr(base, "is_quantized", False)
    most = _ROUNDING if fine else _COARSE_ROUNDING
    for number, one in enumerate(alone):
        apart = sum(float((gradient[0] - batched[name][number]).square().sum()) for name, gradient in one.items())
        size = sum(float(gradient.square().sum()) for gradient in one.values())
        if not apart <= most**2 * size:
            raise UsageError(_mixed(model))
    if any(parameter.grad is not None for parameter in parameters.values()):
        raise UsageError(_mixed(model))
    return sorted(batched)


def _gradients(
    model: AdaptedModel, found: RowGradients, rows: list[Encoded], device: torch.device
) -> dict[str, torch.Tensor]:
    found.take()
    found.rows = len(rows)
    loss: Any = row_means(model, {name: tensor.to(device) for name, tensor in collate(rows, 0).items()})
    loss.backward()
    return found.take()


def _mixed(model: AdaptedModel) -> str:
    name = type(model.get_base_model()).__name__
    return (
        f"[train.privacy] needs the gradient of each row by itself, and {name} mixes the rows of a batch in layers "
        "that are trained. Choose other [train] lora_targets."
    )
