"""Plug in: the federated task vector of proxy block i, added to LLM block S[i]; no training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedproxy.adapter_checks import is_lora, parameter_name, saved_module
from fedproxy.checkpoint_files import Stored, split_number
from fedproxy.errors import ArtifactError
from fedproxy.layer_map import ADAPTER_PREFIX, rekey, split_name
from fedproxy.models.families import blocks_path
from fedproxy.models.merging import parent
from fedproxy.models.source import Source
from fedproxy.models.task_vector import row_slices


def rekey_adapter(tensors: Mapping[str, torch.Tensor], layer_map: Sequence[int], path: str) -> dict[str, torch.Tensor]:
    """Rename the tensors of proxy blocks to those of LLM blocks, which live at `path`.

    Of weights that were trained as they are, some may lie outside the blocks, and keep their names.

    Raises:
        ArtifactError: a tensor is not of a block in the map.
    """
    return {
        name if not is_lora(name) and split_number(name) is None else rekey(name, layer_map, path): tensor
        for name, tensor in tensors.items()
    }


def rekey_config(
    config: Mapping[str, Any], tensors: Iterable[str], path: str, *, spell_out: bool = False
) -> dict[str, Any]:
    """Return the PEFT configuration that puts re-keyed tensors on the LLM's blocks, and on those only.

    With `spell_out` every module is named in full, because other parts of the model have blocks too.
    """
    tensors = list(tensors)
    found = {split_name(name)[1:] for name in tensors if is_lora(name)}
    places = {(block, rest.rsplit(".", 2)[0]) for block, rest in found}
    numbers, modules = ({place[i] for place in places} for i in (0, 1))
    if spell_out or len(places) != len(numbers) * len(modules):
        where: dict[str, Any] = {
            "target_modules": sorted(f"{path}.{block}.{module}" for block, module in places),
            "layers_to_transform": None,
            "layers_pattern": None,
        }
    else:
        where = {
            "target_modules": sorted(str(module) for module in modules),
            "layers_to_transform": sorted(numbers),
            "layers_pattern": path.rpartition(".")[2],
        }
    saved = {saved_module(name, config) for name in tensors if not is_lora(name)} - {None}
    return {
        **config,
        **where,
        "base_model_name_or_path": None,
        "exclude_modules": None,
        "modules_to_save": sorted(str(module) for module in saved) or None,
    }


def on_whole(source: Source, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename an adapter's tensors from the text decoder to the whole model that it is a part of."""
    if not source.multimodal:
        return dict(tensors)
    own, theirs = (f"{ADAPTER_PREFIX}{parent(path)}" for path in (source.blocks_path, blocks_path(source.whole)))
    return {
        theirs + name.removeprefix(own) if name.startswith(own) else name: tensor for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class TaskVector:
    """What training added to a proxy, counted on the blocks of the LLM.

    LoRA is a task vector as it is. Of a bias or another weight that was trained as it is, the task vector is what it
    became less what it was in the proxy.

    Attributes:
        tensors: The adapter's tensors by their names on the LLM.
        before: For trained weights, where the proxy's own values before training lie.
        llm: For trained weights, where the LLM's values lie.
    """

    tensors: Mapping[str, torch.Tensor]
    before: Mapping[str, Stored]
    llm: Mapping[str, Stored]

    def at(self, scale: float, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """The adapter that adds `scale` times the task vector to the LLM; of these names, or of all if none."""
        return {
            name: self._tensor(name, self.tensors[name], scale) for name in (self.tensors if names is None else names)
        }

    def _tensor(self, name: str, tensor: torch.Tensor, scale: float) -> torch.Tensor:
        if is_lora(name):
            return tensor.float() if scale == 1 or ".lora_A." in name else tensor.float() * scale
        before, own = self.before.get(name), self.llm.get(name)
        if scale == 1 and before == own:
            return tensor
        if before is None or own is None:
            raise ArtifactError(
                f"the files of LLM and proxy do not both hold {parameter_name(name)!r} as a tensor of its own, so that "
                "its task vector is unknown. Train the adapter without it."
            )
        return shifted(own.read(), tensor, before.read(), scale)


def shifted(weight: torch.Tensor, trained: torch.Tensor, before: torch.Tensor, scale: float) -> torch.Tensor:
    """Return W + scale * (trained - before), computed in float64, in the data type of the LLM's W; shapes are the same.

    Raises:
        ArtifactError: a value overflows the data type.
    """
    result = torch.empty_like(weight)
    for rows in row_slices(tuple(weight.shape)):
        result[rows] = weight[rows].double() + scale * (trained[rows].double() - before[rows].double())
    if not bool(torch.isfinite(result).all()):
        raise ArtifactError(f"a trained weight overflows {weight.dtype} at scale {scale}. Choose a smaller scale.")
    return result
