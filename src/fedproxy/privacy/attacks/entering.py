"""What enters layers of a model while it runs."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn


class _SeenError(Exception):
    """All that was to be recorded is."""


@contextlib.contextmanager
def entering(model: nn.Module, layers: Sequence[str], *, only: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """Record what enters layers in the forward pass that the block makes, by their names.

    Args:
        model: The model.
        layers: Names of its submodules.
        only: End the forward pass, and with it the block, as soon as all of them have been entered.

    Yields:
        Layer → what entered it last; filled by the forward pass.
    """
    seen: dict[str, torch.Tensor] = {}

    def record(name: str, entered: torch.Tensor) -> None:
        seen[name] = entered.detach()
        if only and len(seen) == len(layers):
            raise _SeenError

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs[0]))
        for name in layers
    ]
    try:
        with torch.no_grad(), contextlib.suppress(_SeenError):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()
