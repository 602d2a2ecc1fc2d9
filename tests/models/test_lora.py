import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict

from fedproxy.adapter_files import write_adapter
from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import model_identity
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models import lora
from fedproxy.models.families import blocks_path
from tests.conftest import FAMILIES, make_model

MANIFEST = Manifest("proxy-adapter", "0" * 64, 12, [0, 2, 3, 7, 9, 11], seed=3)
IDS = torch.arange(20).reshape(1, 20)
EVIL = r"(model\.)?(([a-z0-9_.])+)+!"


def attach(family: str = "llama", **options: Any) -> PeftModel:
    dtype, tied = options.pop("dtype", torch.float32), options.pop("model", {})
    return lora.attach(
        make_model(family, dtype=dtype, **tied), **{"r": 4, "alpha": 8, "dropout": 0.0, "seed": 3, **options}
    )


def noise(model: PeftModel, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in lora.adapter_state(model).items()}


def write(directory: Path, manifest: Manifest = MANIFEST) -> dict[str, torch.Tensor]:
    model = attach()
    tensors = noise(model)
    directory.mkdir()
    write_adapter(directory, lora.adapter_config(model), tensors, manifest)
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_means_the_linear_layers_of_the_blocks_and_no_others(family: str) -> None:
    model = attach(family, dtype=torch.bfloat16)
    path = blocks_path(model.get_base_model())
    state = lora.adapter_state(model)
    assert {name.split(".lora_")[0] for name in state} == {
        f"base_model.model.{name.removesuffix('.base_layer')}"
        for name, module in model.get_base_model().named_modules()
        if name.startswith(f"{path}.")
        and type(module).__name__ in ("Linear", "Conv1D")
        and (name.endswith(".base_layer") or "lora_" not in name)
        and not isinstance(module, PeftModel)
        and not hasattr(module, "lora_A")
    }
    assert all(t.dtype == torch.float32 for t in state.values())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name.replace(".weight", ".default.weight") for name in state}
    assert state.keys() == get_peft_model_state_dict(model).keys()


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_never_touched(tied: bool) -> None:
    state = lora.adapter_state(attach(model={"tie_word_embeddings": tied}))
    assert not any("lm_head" in name or "embed" in name for name in state)


def test_a_fresh_adapter_changes_nothing() -> None:
    before = make_model()(IDS).logits
    assert torch.equal(attach()(IDS).logits, before)


def test_the_seed_alone_decides_the_start_and_global_random_state_is_left_alone() -> None:
    torch.manual_seed(1)
    python, state = random.getstate(), torch.get_rng_state()
    first = lora.adapter_state(attach(seed=7))
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    torch.manual_seed(2)
    again, other = lora.adapter_state(attach(seed=7)), lora.adapter_state(attach(seed=8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    assert not any(first[name].any() for name in first if "lora_B" in name)
    a = first["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]
    assert float(a.abs().max()) <= 48**-0.5
    assert abs(float(a.mean())) < 0.03


def test_layers_and_targets_can_be_chosen() -> None:
    state = lora.adapter_state(attach(layers=[0, 5], targets=["q_proj", "mlp.up_proj"]))
    assert {name.split("layers.")[1].split(".lora")[0] for name in state} == {
        f"{block}.{module}" for block in (0, 5) for module in ("self_attn.q_proj", "mlp.up_proj")
    }


@pytest.mark.parametrize(
    "options",
    [
        {"layers": [6]},
        {"layers": []},
        {"targets": ["lm_head"]},
        {"targets": "q"},
        {"targets": []},
        {"r": 0},
        {"dropout": 1.0},
        {"alpha": float("nan")},
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="LoRA"):
        attach(**options)


def test_state_goes_in_and_comes_out_to_the_bit() -> None:
    model = attach()
    tensors = noise(model)
    lora.set_adapter_state(model, tensors)
    found = lora.adapter_state(model)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    next(iter(found.values())).zero_()
    assert all(torch.equal(t, tensors[name]) for name, t in lora.adapter_state(model).items())


def test_a_state_that_does_not_fit_is_refused_and_leaves_the_model_as_it_was() -> None:
    model = attach()
    good = noise(model)
    name = sorted(good)[-1]
    bad = [
        {k: v for k, v in good.items() if k != name},
        {**good, "foreign": torch.zeros(1)},
        {**good, name: good[name].T},
        {**good, name: good[name].clone().index_fill_(0, torch.tensor([0]), float("nan"))},
        {**good, name: good[name] + float("inf")},
    ]
    before = lora.adapter_state(model)
    for tensors in bad:
        with pytest.raises(ArtifactError):
            lora.set_adapter_state(model, tensors)
    assert all(torch.equal(t, before[k]) for k, t in lora.adapter_state(model).items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bloom"])
def test_plain_peft_loads_a_written_adapter(family: str, tmp_path: Path) -> None:
    model = attach(family, layers=[1, 4])
    lora.set_adapter_state(model, noise(model))
    write_adapter(tmp_path, lora.adapter_config(model), lora.adapter_state(model), MANIFEST)
    loaded = PeftModel.from_pretrained(make_model(family), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not torch.allclose(loaded(IDS).logits, make_model(family)(IDS).logits, atol=1e-3)


def test_a_local_path_is_not_written_down(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = lora.attach(lora.load_model(tiny_checkpoint()), r=2, alpha=2, dropout=0.0, seed=0)
    write_adapter(tmp_path, lora.adapter_config(model), lora.adapter_state(model), MANIFEST)
    assert str(tiny_checkpoint()) not in (tmp_path / "adapter_config.json").read_text()


def test_of_the_configuration_only_what_is_not_pefts_default_is_written(tmp_path: Path) -> None:
    """PEFT before 0.14 refuses keys that it does not know."""
    write(tmp_path / "a")
    found = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    known_to_peft_0_12 = {"layers_to_transform", "layers_pattern", *lora._ALWAYS_SAID}
    assert set(found) <= known_to_peft_0_12
    assert set(found) >= {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules"}
    full = {**LoraConfig().to_dict(), **found, "use_rslora": True}
    assert set(lora.without_defaults(full)) == {*found, "use_rslora"}


def test_a_base_from_the_hub_is_named_by_its_id(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--bank--small-llm" / "snapshots" / "0123abcd"
    shutil.copytree(tiny_checkpoint(), cached)
    model = lora.attach(lora.load_model(cached), r=2, alpha=2, dropout=0.0, seed=0)
    assert lora.adapter_config(model)["base_model_name_or_path"] == "bank/small-llm"


def test_a_pattern_in_memory_is_refused_too() -> None:
    model = attach()
    model.peft_config["default"].target_modules = EVIL
    with pytest.raises(ArtifactError, match="target_modules"):
        lora.held_adapter(model, None, MANIFEST)


def test_an_adapter_is_loaded_only_on_its_own_base(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    proxy = Path(shutil.copytree(llm, tmp_path / "proxy"))
    record = Manifest("proxy", "0" * 64, 12, MANIFEST.layer_map)
    record.write(proxy)
    write(tmp_path / "of-proxy")
    whole = Manifest("llm-adapter", model_identity(llm), 6, [0, 1, 2, 3, 4, 5])
    tensors = write(tmp_path / "of-llm", whole)

    expected = attach()
    lora.set_adapter_state(expected, tensors)
    for base, adapter in ((proxy, "of-proxy"), (llm, "of-llm")):
        model = lora.load_with_adapter(base, tmp_path / adapter)
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
        assert not any(p.requires_grad for p in model.parameters())

    with pytest.raises(ArtifactError, match="is no proxy"):
        lora.load_with_adapter(llm, tmp_path / "of-proxy")
    with pytest.raises(ArtifactError, match="another LLM"):
        lora.load_with_adapter(tiny_checkpoint(num_hidden_layers=5), tmp_path / "of-llm")
    replace(record, layer_map=[0, 1, 3, 7, 9, 11]).write(proxy)
    with pytest.raises(ArtifactError, match="other blocks"):
        lora.load_with_adapter(proxy, tmp_path / "of-proxy")
