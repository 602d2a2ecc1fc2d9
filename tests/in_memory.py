"""Blocks skipped and removed in a model that is in memory: the oracle of what is done with checkpoints as files."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fedproxy.models.families import block_index_holders, blocks, blocks_path, per_block_lists


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


def keep_blocks(model: Any, keep: Sequence[int]) -> Any:
    """Remove all blocks but those numbered `keep`, in place, with everything in model and config that counts blocks."""
    path, old = blocks_path(model), blocks(model)
    lists = per_block_lists(model.config, len(old))
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.ModuleList([old[i] for i in keep]))
    for number, position in enumerate(keep):
        for holder in block_index_holders(old[position]):
            holder.layer_idx = number
    model.config.num_hidden_layers = len(keep)
    for name in lists:
        values = getattr(model.config, name)
        setattr(model.config, name, type(values)(values[i] for i in keep))
    return model
