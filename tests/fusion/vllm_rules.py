"""What vLLM asks of an adapter, said anew after its sources (0.33: lora/peft_helper.py, lora_model.py, utils.py)."""

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

PREFIX = "base_model.model."
MOST = 512
"""The largest `--max-lora-rank`."""
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""`init_lora_weights` that leave the LLM's own weights alone."""
UNKNOWN = (
    *("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"),
    *("modules_to_save", "target_parameters"),
)
"""Settings that vLLM refuses, or that need more than a pair of matrices for each layer."""


def broken_rules(adapter: Path, llm: torch.nn.Module) -> list[str]:
    """The rules that an adapter for this LLM breaks, each with the value that breaks it."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = [f"{name} = {config[name]}" for name in UNKNOWN if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append(f"bias = {config['bias']}")
    if config.get("init_lora_weights") not in PLAIN_INITS:
        found.append(f"init_lora_weights = {config['init_lora_weights']}")
    if not 0 < config["r"] <= MOST:
        found.append(f"r = {config['r']}")
    modules = dict(llm.named_modules())
    sides = Counter[str]()
    for name, tensor in tensors.items():
        module, _, side = name.removeprefix(PREFIX).rpartition(".lora_")
        layer = modules.get(module)
        weight = getattr(layer, "weight", None)
        if not name.startswith(PREFIX) or side not in ("A.weight", "B.weight") or weight is None or weight.ndim != 2:
            found.append(f"{name}: no matrix of a linear layer")
            continue
        sides[module] += 1
        if config["r"] != tensor.shape[0 if side[0] == "A" else 1]:
            found.append(f"{name}: {tuple(tensor.shape)}, not of rank {config['r']}")
    found += [f"{module}: half of a pair" for module, count in sides.items() if count != 2]
    return found if tensors else ["no tensors"]
