"""Plug in: the federated task vector of proxy block i, added to LLM block S[i]; no training."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fedproxy.errors import ArtifactError
from fedproxy.layer_map import ADAPTER_PREFIX, rekey, split_name
from fedproxy.models.checkpoints import Model
from fedproxy.models.families import LinearLayer, blocks, blocks_path, linear_layers, stored_transposed
from fedproxy.models.lora import scaling


def rekey_adapter(
    tensors: Mapping[str, torch.Tensor], layer_map: Sequence[int], path: str, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Rename LoRA tensors of proxy blocks to those of LLM blocks, and multiply every B by `scale` in float32.

    Args:
        tensors: A [r, inputs] and B [outputs, r] by name, counting proxy blocks.
        layer_map: LLM block of each proxy block.
        path: Where the LLM's blocks live.
        scale: Factor of the task vector.

    Returns:
        Tensors by name, counting LLM blocks.

    Raises:
        ArtifactError: a tensor is not of a block in the map.
    """
    return {
        rekey(name, layer_map, path): tensor.float() * scale if name.endswith(".lora_B.weight") else tensor
        for name, tensor in tensors.items()
    }


def rekey_config(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: str) -> dict[str, Any]:
    """Return the PEFT configuration that puts re-keyed `tensors` on the LLM's blocks, and on those only."""
    return {
        **config,
        "base_model_name_or_path": None,
        "layers_to_transform": sorted({split_name(name)[1] for name in tensors}),
        "layers_pattern": path.rpartition(".")[2],
    }


def add_task_vector(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: float, transposed: bool = False
) -> torch.Tensor:
    """Return W + factor * B A, computed in float32, in the data type of W.

    Args:
        weight: W, [outputs, inputs]; [inputs, outputs] if `transposed`.
        a: A, [r, inputs].
        b: B, [outputs, r].
        factor: alpha / r of the adapter.
        transposed: W is stored transposed, as GPT-2's Conv1D does.

    Returns:
        The new W; the same tensor if B is zero.

    Reference:
        FedProxy, Eq. 15. The task vector is added; overwriting the block would be the same only as long as the proxy
        block started as the LLM block.
    """
    if not bool(b.any()):
        return weight
    delta = b.float() @ a.float()
    return (weight.float() + (delta.T if transposed else delta) * factor).to(weight.dtype)


def check_fits(model: Model, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Check that every tensor belongs to a linear layer of `model` that takes its shape.

    Args:
        model: The LLM; its weights may be on the meta device.
        tensors: Tensors that count LLM blocks.
        config: PEFT configuration of the adapter.

    Raises:
        ArtifactError: one does not.
    """
    transposed = bool(config.get("fan_in_fan_out"))
    for name, layer in _layers(model, tensors).items():
        tensor = tensors[name]
        if stored_transposed(layer) != transposed:
            raise ArtifactError(f"adapter tensor {name!r}: fan_in_fan_out = {transposed} does not fit its layer.")
        outputs, inputs = reversed(layer.weight.shape) if transposed else layer.weight.shape
        found, need = (tensor.shape[1], inputs) if ".lora_A." in name else (tensor.shape[0], outputs)
        if found != need:
            raise ArtifactError(
                f"adapter tensor {name!r} has shape {tuple(tensor.shape)}; its layer has {inputs} inputs and "
                f"{outputs} outputs."
            )


def _layers(model: Model, names: Iterable[str]) -> dict[str, LinearLayer]:
    path = blocks_path(model)
    known = {
        f"{path}.{number}.{name}": layer
        for number, block in enumerate(blocks(model))
        for name, layer in linear_layers(block).items()
    }
    found = {}
    for name in names:
        module = name.removeprefix(ADAPTER_PREFIX).rsplit(".", 2)[0]
        if module not in known:
            raise ArtifactError(f"adapter tensor {name!r} belongs to no linear layer of {type(model).__name__}.")
        found[name] = known[module]
    return found


def merge_into(model: Model, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Add the task vectors of re-keyed `tensors` to the weights of `model`, in place; no other tensor changes.

    Raises:
        ArtifactError: a tensor does not fit, or a weight overflows its data type.
    """
    check_fits(model, tensors, config)
    transposed = bool(config.get("fan_in_fan_out"))
    for name, layer in _layers(model, tensors).items():
        if ".lora_A." not in name:
            continue
        a, b = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
        merged = add_task_vector(layer.weight.data, a, b, scaling(config), transposed)
        if not bool(torch.isfinite(merged).all()):
            raise ArtifactError(f"fusing {name!r} overflows {merged.dtype}. Choose a smaller scale.")
        layer.weight.data = merged
