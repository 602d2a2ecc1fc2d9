"""Where the clients disagree: the mean conflict (FedProxy, Eq. 7) in each block and kind of layer, round by round."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from fedproxy.artifacts import inside
from fedproxy.errors import ArtifactError
from fedproxy.layer_map import split_name
from fedproxy.tensor_files import load_tensors
from fedproxy.tensors import Tensors

_PARAMETERS = (".lora_A.weight", ".lora_B.weight", ".weight", ".bias")


@dataclass(frozen=True)
class Conflict:
    """The conflict after one round.

    Attributes:
        round: Counted from 1.
        means: LLM block and kind of layer → mean over the trained coordinates.
        blocks: LLM block → mean over all of the block's.
    """

    round: int
    means: dict[tuple[int, str], float]
    blocks: dict[int, float]


def kind_of(rest: str) -> str:
    """The kind of layer that a tensor's name within its block means; numbered parts, such as experts, are one kind.

    Example:
        >>> kind_of("mlp.experts.3.up_proj.lora_A.weight")
        'mlp.experts.up_proj'
    """
    for suffix in _PARAMETERS:
        rest = rest.removesuffix(suffix)
    return ".".join(part for part in rest.split(".") if not part.isdigit())


def mean_conflict(tensors: Tensors, layer_map: list[int]) -> tuple[dict[tuple[int, str], float], dict[int, float]]:
    """Mean over the coordinates, by (LLM block, kind of layer) and by LLM block.

    Args:
        tensors: Conflict of each coordinate, by adapter tensor name, counting proxy blocks.
        layer_map: LLM block of each proxy block.

    Raises:
        ArtifactError: a tensor is of a block that is not in the map.
    """
    sums: dict[tuple[int, str], float] = defaultdict(float)
    counts: dict[tuple[int, str], int] = defaultdict(int)
    for name in sorted(tensors):
        _, block, rest = split_name(name)
        if block >= len(layer_map):
            raise ArtifactError(f"conflict of {name!r}: the layer map has {len(layer_map)} blocks, no block {block}.")
        key = layer_map[block], kind_of(rest)
        sums[key] += float(tensors[name].sum(dtype=torch.float64))
        counts[key] += tensors[name].numel()
    blocks = sorted({block for block, _ in sums})

    def over(chosen: int) -> float:
        keys = [key for key in sums if key[0] == chosen]
        return sum(sums[key] for key in keys) / sum(counts[key] for key in keys)

    return {key: sums[key] / counts[key] for key in sums}, {block: over(block) for block in blocks}


def load_conflict(run_dir: Path, layer_map: list[int]) -> list[Conflict]:
    """Read the conflict of every round that keeps its tensors.

    Args:
        run_dir: The run. A round has no conflict where the space of the merge tells none, or where `keep_rounds` let it
            go.
        layer_map: LLM block of each proxy block.

    Raises:
        ArtifactError: a file is damaged, or of another proxy, or a link leads out of the run.
    """
    names = sorted(path.parent.name for path in Path(run_dir).glob("rounds/*/conflict.safetensors"))
    return [
        Conflict(
            int(name),
            *mean_conflict(load_tensors(inside(Path(run_dir), f"rounds/{name}/conflict.safetensors")), layer_map),
        )
        for name in names
        if name.isdecimal()
    ]
