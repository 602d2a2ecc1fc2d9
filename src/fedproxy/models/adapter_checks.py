"""What an adapter's files must say before they are believed: plain LoRA on the blocks that its manifest names."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedproxy import layer_map as layers_of
from fedproxy.artifacts import Manifest
from fedproxy.errors import ArtifactError

_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
)
_PLAIN: dict[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
_SIDES = {"lora_A.weight": "lora_B.weight", "lora_B.weight": "lora_A.weight"}


def stamp(manifest: Manifest) -> dict[str, str]:
    """Return what the tensor file repeats of the manifest, so that an exchanged manifest is noticed."""
    return {
        "fedproxy.kind": manifest.kind,
        "fedproxy.llm": f"{manifest.llm_blocks} {manifest.llm_sha256}",
        "fedproxy.layer_map": json.dumps(manifest.layer_map),
    }


def check_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Check that no tensor holds NaN or infinity.

    Raises:
        ArtifactError: one does; it is named.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{source}: tensor {name!r} holds NaN or infinity.")


def check_config(config: Any, path: Path) -> None:
    """Check that a PEFT configuration is of plain LoRA, which alone can be moved between blocks.

    Raises:
        ArtifactError: it is not.
    """
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ArtifactError(f"{path} describes no LoRA adapter.")
    if type(config.get("r")) is not int or config["r"] < 1:
        raise ArtifactError(f"{path}: r must be a positive integer, got {config.get('r')!r}.")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ArtifactError(f"{path}: lora_alpha must be a finite number, got {alpha!r}.")
    extra = [name for name in _UNSUPPORTED if config.get(name)]
    extra += [name for name, plain in _PLAIN.items() if config.get(name, plain[0]) not in plain]
    if extra:
        raise ArtifactError(f"{path} uses {', '.join(extra)}; only plain LoRA can be moved between blocks.")


def check_layout(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], manifest: Manifest, file: Path
) -> None:
    """Check that the tensors are pairs of LoRA matrices of the configured rank, on blocks that the manifest allows.

    Raises:
        ArtifactError: they are not; the tensor is named.
    """
    rank = config["r"]
    blocks = range(len(manifest.layer_map)) if manifest.kind == "proxy-adapter" else manifest.layer_map
    if not tensors:
        raise ArtifactError(f"{file} holds no tensors.")
    for name, tensor in tensors.items():
        _, block, rest = layers_of.split_name(name)
        module, side = rest[: -len("lora_A.weight")], rest[-len("lora_A.weight") :]
        if side not in _SIDES or not module.endswith("."):
            raise ArtifactError(f"{file}: {name!r} is no LoRA tensor (lora_A.weight or lora_B.weight).")
        if name.removesuffix(side) + _SIDES[side] not in tensors:
            raise ArtifactError(f"{file}: {name!r} has no counterpart {_SIDES[side]}.")
        if block not in blocks:
            raise ArtifactError(
                f"{file}: {name!r} is of block {block}; a {manifest.kind} with layer map {manifest.layer_map} has none."
            )
        if tensor.ndim != 2 or tensor.shape[side == "lora_B.weight"] != rank or not tensor.is_floating_point():
            raise ArtifactError(
                f"{file}: {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, no matrix of rank {rank}."
            )
