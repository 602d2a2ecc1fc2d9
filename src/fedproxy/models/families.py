"""The blocks of a decoder, found by looking at the model."""

import copy
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedproxy.errors import ArtifactError, UsageError

LinearLayer = nn.Linear | Conv1D
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3"),
    *("gpt2", "opt", "gpt_neox", "bloom", "mixtral", "qwen3_moe"),
)


def _refuse(model: PreTrainedModel, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{type(model).__name__} cannot be compressed or fused: {reason}. "
        f"Use a decoder-only transformer; tested are {', '.join(FAMILIES)}, and the text decoders of gemma3 and llava."
    )


def check_plain(model: object) -> None:
    """Check that an object given as a model is one of transformers, as yet without an adapter.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model, "peft_config", None):
        what = "has an adapter already" if isinstance(model, nn.Module) else "is no model"
        raise UsageError(f"{type(model).__name__} {what}. Give a plain model of transformers, or a directory.")


def block_index_holders(block: nn.Module) -> list[nn.Module]:
    """Return the modules of a block that hold its number (`layer_idx`)."""
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
        and all({holder.layer_idx for holder in block_index_holders(b)} == {i} for i, b in enumerate(module))
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


def keep_blocks(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """Copy a model without its other blocks; what counts the blocks, in model and config, counts those of the copy.

    A block that is named again is there again, with weights of its own.

    Raises:
        ArtifactError: see `blocks_path`.
    """
    path, old = blocks_path(model), blocks(model)
    gone = {id(block): nn.Identity() for number, block in enumerate(old) if number not in keep}
    small = copy.deepcopy(model, gone)
    parent, _, attribute = path.rpartition(".")
    kept = nn.ModuleList()
    for place, number in enumerate(keep):
        block = small.get_submodule(f"{path}.{number}")
        kept.append(copy.deepcopy(block) if number in keep[:place] else block)
    setattr(small.get_submodule(parent), attribute, kept)
    for number, block in enumerate(kept):
        for holder in block_index_holders(block):
            holder.layer_idx = number  # type: ignore[assignment]
    for name in per_block_lists(small.config, len(old)):
        values = getattr(small.config, name)
        setattr(small.config, name, type(values)(values[number] for number in keep))
    small.config.num_hidden_layers = len(keep)
    return small


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


def readable(config: PreTrainedConfig, length: int) -> int:
    """So many tokens, or as many as a model of this configuration has positions for."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(length, positions or length)


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
