"""Which LLM block each proxy block is: a rising list, position = proxy block, value = LLM block, both 0-based.

The LoRA tensor of block i of a model whose blocks live at `model.layers` is called
`base_model.model.model.layers.<i>.<module>.lora_A.weight`; putting an adapter on other blocks renames it.
"""

import re
from collections.abc import Sequence
from typing import Literal

from fedproxy.errors import ArtifactError, UsageError

ADAPTER_PREFIX = "base_model.model."
_WORDS = r"[^0-9.][^.]*(?:\.[^0-9.][^.]*)*"
_NAME = re.compile(rf"base_model\.model\.(?P<path>{_WORDS})\.(?P<block>0|[1-9][0-9]{{0,8}})\.(?P<rest>.+)")


def split_name(name: str) -> tuple[str, int, str]:
    """Split an adapter tensor's name into the path of the blocks, the block's number, and the name within the block.

    Raises:
        ArtifactError: the name is no tensor of a block.

    Example:
        >>> split_name("base_model.model.model.layers.3.mlp.up_proj.lora_A.weight")
        ('model.layers', 3, 'mlp.up_proj.lora_A.weight')
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ArtifactError(
            f"adapter tensor {name!r} is of no block; names must be {ADAPTER_PREFIX}PATH.BLOCK.MODULE.lora_A.weight."
        )
    return match["path"], int(match["block"]), match["rest"]


def rekey(name: str, layer_map: Sequence[int], blocks_path: str) -> str:
    """Rename the adapter tensor of proxy block i to that of LLM block `layer_map[i]`.

    Raises:
        ArtifactError: the tensor lies outside the blocks, or in a block that the map does not hold.

    Example:
        >>> rekey("base_model.model.model.layers.1.mlp.up_proj.lora_A.weight", [0, 4], "model.layers")
        'base_model.model.model.layers.4.mlp.up_proj.lora_A.weight'
    """
    path, block, rest = split_name(name)
    if path != blocks_path:
        raise ArtifactError(f"adapter tensor {name!r} is not under {blocks_path!r}, where this model's blocks live.")
    if block >= len(layer_map):
        raise ArtifactError(
            f"adapter tensor {name!r} is of block {block}, but the layer map has {len(layer_map)} blocks. "
            "Was the adapter re-keyed already?"
        )
    return f"{ADAPTER_PREFIX}{path}.{layer_map[block]}.{rest}"


def check_layer_map(layers: Sequence[int], count: int) -> None:
    """Check that a proxy can keep these blocks of an LLM that has so many.

    Raises:
        UsageError: they are no rising list of its blocks.
    """
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= count:
        raise UsageError(f"blocks to keep must be a rising list of numbers from 0 to {count - 1}, got {list(layers)}.")


def block_numbers(chosen: Sequence[int], count: int) -> list[int]:
    """The blocks, of so many, that numbers mean, rising and once each; negative ones count from the end.

    Raises:
        UsageError: there is no such block.

    Example:
        >>> block_numbers([0, 1, -2, -1], 6)
        [0, 1, 4, 5]
    """
    if wrong := [number for number in chosen if not -count <= number < count]:
        raise UsageError(f"blocks {wrong}: there are {count} blocks; give numbers from {-count} to {count - 1}.")
    return sorted({number % count for number in chosen})


def trained_blocks(chosen: Literal["all"] | Sequence[int], count: int) -> list[int]:
    """The blocks that [train] blocks means, of so many; errors as of `block_numbers`."""
    return list(range(count)) if chosen == "all" else block_numbers(chosen, count)
