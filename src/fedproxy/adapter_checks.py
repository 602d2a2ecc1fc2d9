"""What an adapter's files must say before they are believed: LoRA on the blocks that its manifest names.

Beside the pairs of LoRA an adapter may hold weights that were trained as they are: biases (PEFT's `bias`) and whole
modules (`modules_to_save`), in the blocks or outside. Their values are absolute, not changes.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from fedproxy import layer_map as layers_of
from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import split_number
from fedproxy.errors import ArtifactError

_LARGEST_ALPHA = 1e9
_UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("monteclora_config", "velora_config", "lora_bias", "rank_pattern", "alpha_pattern", "target_parameters"),
    *("trainable_token_indices", "layer_replication"),
)
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", "lora_only", "all"),
    "init_lora_weights": (True, False, "gaussian"),
}
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
"""What PEFT matches the names of modules with, some of it as regular expressions, which can take for ever."""
_NAME, _MOST_NAMES = re.compile(r"[\w.-]{1,256}"), 100_000
_SIDES = {"lora_A.weight": "lora_B.weight", "lora_B.weight": "lora_A.weight"}
_SIDE_LENGTH = len("lora_A.weight")


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
        if not math.isfinite(float(tensor.norm())) and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{source}: tensor {name!r} holds NaN or infinity.")


def check_config(config: Any, path: Path) -> None:
    """Check that a PEFT configuration is of LoRA that can be moved between blocks.

    That is LoRA of one rank, rank-stabilised or not, with trained biases and saved modules or without, on modules that
    are named: a regular expression from outside may never end.

    Raises:
        ArtifactError: it is not.
    """
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        sort = config.get("peft_type") if isinstance(config, dict) else None
        raise ArtifactError(f"{path} describes no LoRA adapter; its peft_type is {sort!r:.40}.")
    if type(config.get("r")) is not int or config["r"] < 1:
        raise ArtifactError(f"{path}: r must be a positive integer, got {config.get('r')!r}.")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST_ALPHA:
        raise ArtifactError(
            f"{path}: lora_alpha must be a number of at most {_LARGEST_ALPHA:g}, got {str(alpha)[:40]}."
        )
    extra = [name for name in _UNSUPPORTED if config.get(name)]
    extra += [name for name, plain in _PLAIN.items() if config.get(name, plain[0]) not in plain]
    if extra:
        raise ArtifactError(f"{path} uses {', '.join(extra)}; only plain LoRA can be moved between blocks.")
    for key in _PATTERNS:
        held = config.get(key) or []
        names = [held] if isinstance(held, str) and key != "modules_to_save" else held
        if not isinstance(names, list) or len(names) > _MOST_NAMES or not all(map(_is_name, names)):
            raise ArtifactError(f"{path}: {key} must be a list of names of modules, no pattern, got {held!r:.80}.")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def is_lora(name: str) -> bool:
    """Tell whether an adapter's tensor is one of a pair of LoRA matrices, not a trained weight itself."""
    return name[-_SIDE_LENGTH:] in _SIDES


def parameter_name(name: str) -> str:
    """The name in the model of the weight that an adapter's tensor belongs to.

    Example:
        >>> parameter_name("base_model.model.model.layers.3.mlp.up_proj.lora_A.weight")
        'model.layers.3.mlp.up_proj.weight'
        >>> parameter_name("base_model.model.model.layers.3.mlp.up_proj.base_layer.bias")
        'model.layers.3.mlp.up_proj.bias'
    """
    inner = name.removeprefix(layers_of.ADAPTER_PREFIX)
    if is_lora(name):
        return f"{inner[: -_SIDE_LENGTH - 1]}.weight"
    module, _, leaf = inner.rpartition(".")
    return f"{module.removesuffix('.base_layer')}.{leaf}"


def saved_module(name: str, config: Mapping[str, Any]) -> str | None:
    """The module that an adapter's tensor is a saved weight of, as `modules_to_save` finds it; none if it does not.

    With `ensure_weight_tying` PEFT saves what is tied to a saved module, too, without naming it.
    """
    module = parameter_name(name).rpartition(".")[0]
    if config.get("ensure_weight_tying") and config.get("modules_to_save") and split_number(name) is None:
        return module
    parts = module.split(".")
    paths = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    saved = config.get("modules_to_save") or []
    return module if any(path.endswith(ending) for path in paths for ending in saved) else None


def _is_trained_bias(name: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> bool:
    if not name.endswith(".bias") or config.get("bias", "none") == "none":
        return False
    module = parameter_name(name).removesuffix(".bias")
    return config["bias"] == "all" or f"{layers_of.ADAPTER_PREFIX}{module}.lora_A.weight" in tensors


def check_layout(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], manifest: Manifest, file: Path
) -> None:
    """Check that the tensors are what the configuration announces, on blocks that the manifest allows.

    Pairs of LoRA matrices have the configured rank; other tensors are trained biases or weights of saved modules.

    Raises:
        ArtifactError: they are not; the tensor is named.
    """
    rank = config["r"]
    blocks = range(len(manifest.layer_map)) if manifest.kind == "proxy-adapter" else manifest.layer_map
    if not tensors:
        raise ArtifactError(f"{file} holds no tensors.")
    held = {name for name in tensors if not is_lora(name)}
    lost = [
        ending
        for ending in config.get("modules_to_save") or []
        if not any(saved_module(name, {"modules_to_save": [ending]}) for name in held)
    ]
    if lost:
        raise ArtifactError(f"{file} lacks the modules_to_save {', '.join(lost)} that its configuration announces.")
    for name, tensor in tensors.items():
        whole = not is_lora(name) and (
            saved_module(name, config) is not None or _is_trained_bias(name, tensors, config)
        )
        if not (whole and name.startswith(layers_of.ADAPTER_PREFIX) and split_number(name) is None):
            _, block, rest = layers_of.split_name(name)
            if block not in blocks:
                raise ArtifactError(
                    f"{file}: {name!r} is of block {block}; a {manifest.kind} with layer map {manifest.layer_map} has "
                    "none."
                )
        if whole:
            if not tensor.is_floating_point():
                raise ArtifactError(f"{file}: {name!r} is {tensor.dtype}, no weight.")
            continue
        module, side = rest[:-_SIDE_LENGTH], rest[-_SIDE_LENGTH:]
        if side not in _SIDES or not module.endswith("."):
            raise ArtifactError(f"{file}: {name!r} is no LoRA tensor (lora_A.weight or lora_B.weight).")
        if name.removesuffix(side) + _SIDES[side] not in tensors:
            raise ArtifactError(f"{file}: {name!r} has no counterpart {_SIDES[side]}.")
        if tensor.ndim != 2 or tensor.shape[side == "lora_B.weight"] != rank or not tensor.is_floating_point():
            raise ArtifactError(
                f"{file}: {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, no matrix of rank {rank}."
            )


def check_targets(targets: Any, modules: Collection[str], path: Path) -> None:
    """Check that an adapter's modules are those that its configuration targets; a pattern is not matched.

    Raises:
        ArtifactError: a target has no tensors, or a module is no target.
    """
    if not isinstance(targets, list):
        return
    endings = {module: _endings(module) for module in modules}
    wanted = set(map(str, targets))
    lost = wanted - set().union(*endings.values())
    foreign = [module for module in sorted(modules) if endings[module].isdisjoint(wanted)]
    if lost or foreign:
        raise ArtifactError(
            f"{path}: target_modules and tensors differ; only the former name {sorted(lost)[:3]}, only the latter "
            f"{foreign[:3]}."
        )


def _endings(module: str) -> set[str]:
    parts = module.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}
