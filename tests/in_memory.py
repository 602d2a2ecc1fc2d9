"""Blocks skipped in a model that is in memory: the oracle of what removing them gives."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fedproxy.models.families import blocks


@contextlib.contextmanager
def skipping(model: Any, skipped: Sequence[int]) -> Iterator[None]:
    """Make the blocks numbered `skipped` the identity while the context lasts (without a key-value cache)."""

    def identity(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> object:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layers = blocks(model)
    handles = [layers[i].register_forward_hook(identity, with_kwargs=True) for i in skipped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
