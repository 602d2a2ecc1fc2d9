"""An adapter's files, as PEFT reads them: written, read and checked without a model.

Whoever moves adapters about, as a server does, needs neither PEFT nor transformers, which take seconds to import.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedproxy.adapter_checks import check_config, check_finite, check_layout, stamp
from fedproxy.artifacts import CONFIG_BYTES, MANIFEST, Manifest, read_json, write_json
from fedproxy.errors import ArtifactError
from fedproxy.tensor_files import load_tensors, read_header, save_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

KINDS = ("proxy-adapter", "llm-adapter")


def write_adapter(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], manifest: Manifest
) -> None:
    """Write an adapter that PEFT loads: `adapter_config.json`, `adapter_model.safetensors`, `fedproxy.json`.

    The tensor file repeats the manifest's kind, LLM and layer map, so that an exchanged manifest is noticed. The same
    arguments give the same bytes. Each file is atomic; for the directory use `artifacts.new_directory`.
    """
    directory = Path(directory)
    write_json(directory / CONFIG_FILE, dict(config))
    save_tensors(directory / WEIGHTS_FILE, tensors, metadata=stamp(manifest))
    manifest.write(directory)


def scaling(config: Mapping[str, Any]) -> float:
    """Return what an adapter's B·A is multiplied by: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
    rank = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return float(config["lora_alpha"] / rank)


def read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], Manifest]:
    """Read an adapter and check that its files belong together and that it is LoRA on numbered blocks.

    Beside pairs of LoRA it may hold trained biases and saved modules.

    Args:
        directory: Where the adapter lies.

    Returns:
        PEFT configuration, tensors by name, manifest.

    Raises:
        ArtifactError: a file is missing, damaged or exchanged, the adapter is of a sort that cannot be moved between
            blocks, names blocks outside its layer map, or holds NaN or infinity.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        why = f"it holds no {MANIFEST}" if directory.is_dir() else "there is no such directory"
        of = {directory / "adapter": "proxy", directory / "fused": "LLM"}
        inside = [f"{place} (for the {base})" for place, base in of.items() if (place / MANIFEST).is_file()]
        remedy = f"It is a run: give {' or '.join(inside)}" if inside else "Check the path"
        if (directory / CONFIG_FILE).is_file():
            remedy = "If it was trained on a proxy by PEFT or TRL, give that proxy, too (--proxy DIR)"
        raise ArtifactError(f"{directory} is no adapter of fedproxy's: {why}. {remedy}.")
    manifest = Manifest.read(directory)
    if manifest.kind not in KINDS:
        raise ArtifactError(f"{directory} holds a {manifest.kind!r}, not an adapter ({' or '.join(KINDS)}).")
    config = read_json(directory / CONFIG_FILE, CONFIG_BYTES)
    check_config(config, directory / CONFIG_FILE)
    file = directory / WEIGHTS_FILE
    found = read_header(file).metadata
    wrong = [name for name, value in stamp(manifest).items() if found.get(name) != value]
    if wrong:
        raise ArtifactError(
            f"{directory}: fedproxy.json and {WEIGHTS_FILE} do not belong together ({', '.join(wrong)} differ). "
            "Use the directory as fedproxy wrote it."
        )
    tensors = load_tensors(file)
    check_layout(tensors, config, manifest, file)
    check_finite(tensors, str(file))
    return config, tensors, manifest
