"""The blocks of a decoder, found by looking at the model: where they live, how to skip them, how to remove them."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedproxy.errors import ArtifactError, UsageError

LinearLayer = nn.Linear | Conv1D
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
    "gpt2",
    "opt",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
)


def _refuse(model: PreTrainedModel, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{type(model).__name__} cannot be compressed or fused: {reason}. "
        f"Use a decoder-only transformer; tested are {', '.join(FAMILIES)}, and the text decoders of gemma3 and llava."
    )


def _block_index_holders(block: nn.Module) -> list[nn.Module]:
    return [module for module in block.modules() if isinstance(getattr(module, "layer_idx", None), int)]


def blocks_path(model: PreTrainedModel) -> str:
    """Return where the blocks of `model` live, as in "model.layers" or "transformer.h".

    They are the `nn.ModuleList` that is as long as the config's block count and whose every element holds a
    module with its own block number (`layer_idx`).

    Raises:
        ArtifactError: the model is an encoder-decoder, recurrent (state-space), or has no such list.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise _refuse(model, "it is an encoder-decoder")
    if getattr(model, "_is_stateful", False):
        raise _refuse(model, "it has recurrent (state-space or linear-attention) blocks")
    count = getattr(config, "num_hidden_layers", None)
    found: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all({holder.layer_idx for holder in _block_index_holders(b)} == {i} for i, b in enumerate(module))
    ]
    if len(found) != 1:
        raise _refuse(model, f"{len(found) or 'no'} lists of its {count} blocks were found")
    return found[0]


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of blocks of `model`.

    Raises:
        ArtifactError: see `blocks_path`.
    """
    found = model.get_submodule(blocks_path(model))
    assert isinstance(found, nn.ModuleList)
    return found


def linear_layers(block: nn.Module) -> dict[str, LinearLayer]:
    """Return the linear layers of one block, by their name within the block."""
    return {name: module for name, module in block.named_modules() if isinstance(module, LinearLayer)}


def stored_transposed(layer: LinearLayer) -> bool:
    """Tell whether `layer` stores its weight as [inputs, outputs], as GPT-2's Conv1D does."""
    return isinstance(layer, Conv1D)


def vocabulary(model: PreTrainedModel) -> int:
    """Return the number of tokens that the input embeddings of `model` hold."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    return embeddings.num_embeddings


@contextlib.contextmanager
def skipping(model: PreTrainedModel, skipped: Sequence[int]) -> Iterator[None]:
    """Make the blocks numbered `skipped` the identity while the context lasts (without a key-value cache)."""

    def identity(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: object) -> torch.Tensor:
        hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden

    layers = blocks(model)
    handles = [layers[i].register_forward_hook(identity, with_kwargs=True) for i in skipped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def per_block_lists(config: PreTrainedConfig, count: int) -> list[str]:
    """Return the names of the lists in `config` that have one entry for each of the `count` blocks."""
    common = vars(PreTrainedConfig())
    return [
        name
        for name, value in vars(config).items()
        if isinstance(value, list | tuple)
        and len(value) == count
        and name not in common
        and not name.endswith("_token_id")
    ]


def keep_blocks(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """Remove all blocks but those numbered `keep`, in place.

    Every block number inside the kept blocks, the config's block count, and every config list with one entry
    per block follow.

    Args:
        model: A decoder; changed.
        keep: Rising block numbers, 0-based, at least one.

    Returns:
        The same model.

    Raises:
        ArtifactError: see `blocks_path`.
        UsageError: `keep` is no rising list of the model's blocks.
    """
    path = blocks_path(model)
    old = blocks(model)
    keep = list(keep)
    if not keep or keep != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= len(old):
        raise UsageError(f"blocks to keep must be a rising list of numbers from 0 to {len(old) - 1}, got {keep}.")
    lists = per_block_lists(model.config, len(old))
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.ModuleList([old[i] for i in keep]))
    for number, position in enumerate(keep):
        for holder in _block_index_holders(old[position]):
            holder.layer_idx = number  # type: ignore[assignment]
    model.config.num_hidden_layers = len(keep)
    for name in lists:
        values = getattr(model.config, name)
        setattr(model.config, name, type(values)(values[i] for i in keep))
    return model
