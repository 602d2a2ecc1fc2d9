"""Fused adapters are such as vLLM takes; and the rules that say so find an adapter that it would not take."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedproxy.fusion import fuse
from tests.fusion.test_fuse import FAMILIES, Checkpoint, make_adapter
from tests.fusion.vllm_rules import PREFIX, broken_rules


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_adapter_breaks_no_rule(family: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint(family)
    _, adapter = make_adapter(llm, tmp_path / "adapter", use_rslora=True)
    assert (
        broken_rules(fuse(llm, adapter, tmp_path / "fused", scale=0.3), AutoModelForCausalLM.from_pretrained(llm)) == []
    )


def lost_half(tensors: dict[str, Any]) -> None:
    del tensors[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight"]


def other_rank(tensors: dict[str, Any]) -> None:
    name = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors[name] = tensors[name][:2].clone()


def no_layer(tensors: dict[str, Any]) -> None:
    name = "model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors[f"{PREFIX}{name}".replace("layers.1", "layers.7")] = tensors.pop(f"{PREFIX}{name}")


@pytest.mark.parametrize(
    ("settings", "change", "named"),
    [
        ({"use_dora": True}, None, "use_dora"),
        ({"bias": "all"}, None, "bias"),
        ({"modules_to_save": ["norm"]}, None, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, None, "pissa"),
        ({"r": 1024}, None, "1024"),
        ({}, lost_half, "q_proj"),
        ({}, other_rank, "q_proj"),
        ({}, no_layer, "layers.7"),
    ],
)
def test_the_rules_find_what_vllm_refuses(
    settings: dict[str, Any],
    change: Callable[[dict[str, Any]], None] | None,
    named: str,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    fused = fuse(llm, adapter, tmp_path / "fused")
    config = json.loads((fused / "adapter_config.json").read_text())
    (fused / "adapter_config.json").write_text(json.dumps(config | settings))
    if change:
        tensors = load_file(fused / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, fused / "adapter_model.safetensors")
    found = broken_rules(fused, AutoModelForCausalLM.from_pretrained(llm))
    assert found
    assert any(named in rule for rule in found)
