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
from safetensors.torch import load_file, save_file

from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import model_identity
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models import lora
from fedproxy.models.families import blocks_path
from tests.conftest import FAMILIES, make_model

MANIFEST = Manifest("proxy-adapter", "0" * 64, 12, [0, 2, 3, 7, 9, 11], seed=3)
IDS = torch.arange(20).reshape(1, 20)


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
    lora.write_adapter(directory, model, tensors, manifest)
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
    lora.write_adapter(tmp_path, model, lora.adapter_state(model), MANIFEST)
    loaded = PeftModel.from_pretrained(make_model(family), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not torch.allclose(loaded(IDS).logits, make_model(family)(IDS).logits, atol=1e-3)


def test_writing_is_reproducible_and_reading_gives_it_back(tmp_path: Path) -> None:
    tensors = write(tmp_path / "a")
    write(tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    config, found, manifest = lora.read_adapter(tmp_path / "a")
    assert manifest == MANIFEST
    assert config["r"] == 4
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_local_path_is_not_written_down(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = lora.attach(lora.load_model(tiny_checkpoint()), r=2, alpha=2, dropout=0.0, seed=0)
    lora.write_adapter(tmp_path, model, lora.adapter_state(model), MANIFEST)
    assert str(tiny_checkpoint()) not in (tmp_path / "adapter_config.json").read_text()


def test_of_the_configuration_only_what_is_not_pefts_default_is_written(tmp_path: Path) -> None:
    """PEFT before 0.14 refuses keys that it does not know."""
    write(tmp_path / "a")
    found = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    known_to_peft_0_12 = {"layers_to_transform", "layers_pattern", *lora._ALWAYS_SAID}
    assert set(found) <= known_to_peft_0_12
    assert set(found) >= {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules"}
    full = {**LoraConfig().to_dict(), **found, "use_rslora": True}
    lora.write_adapter(tmp_path / "a", full, load_file(tmp_path / "a" / lora.WEIGHTS_FILE), MANIFEST)
    assert set(json.loads((tmp_path / "a" / "adapter_config.json").read_text())) == {*found, "use_rslora"}


def test_an_adapter_with_all_of_pefts_keys_is_still_read(tmp_path: Path) -> None:
    write(tmp_path / "a")
    config, _, _ = lora.read_adapter(tmp_path / "a")
    full = {**LoraConfig().to_dict(), **config}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(full))
    assert lora.read_adapter(tmp_path / "a")[0] == json.loads(json.dumps(full))


def test_a_base_from_the_hub_is_named_by_its_id(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--bank--small-llm" / "snapshots" / "0123abcd"
    shutil.copytree(tiny_checkpoint(), cached)
    model = lora.attach(lora.load_model(cached), r=2, alpha=2, dropout=0.0, seed=0)
    assert lora.adapter_config(model)["base_model_name_or_path"] == "bank/small-llm"


@pytest.mark.parametrize(
    "change",
    [{"kind": "llm-adapter"}, {"llm_sha256": "1" * 64}, {"llm_blocks": 13}, {"layer_map": [0, 1, 3, 7, 9, 11]}],
)
def test_an_exchanged_manifest_is_noticed(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path / "a")
    replace(MANIFEST, **change).write(tmp_path / "a")
    with pytest.raises(ArtifactError, match="do not belong together"):
        lora.read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"r": 5},
        {"r": "4"},
        {"lora_alpha": None},
        {"use_dora": True},
        {"bias": "some"},
        {"modules_to_save": ["lm_head"]},
        {"alpha_pattern": {"q_proj": 3}},
        {"init_lora_weights": "pissa"},
    ],
)
def test_other_configurations_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ArtifactError):
        lora.read_adapter(tmp_path / "a")


EVIL = r"(model\.)?(([a-z0-9_.])+)+!"


@pytest.mark.parametrize(
    "value", [EVIL, [EVIL], ["up_proj", EVIL], "a" * 300, ["a"] * 100_001, [5], {"a": 1}, r".*\.q"]
)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern", "modules_to_save"])
def test_what_peft_would_match_as_a_pattern_is_refused_by_its_key(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ArtifactError, match=key):
        lora.read_adapter(tmp_path / "a")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_parameters"])
def test_ranks_by_pattern_are_refused_by_their_key(tmp_path: Path, key: str) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: {EVIL: 2}}))
    with pytest.raises(ArtifactError, match=key):
        lora.read_adapter(tmp_path / "a")


def test_a_pattern_in_memory_is_refused_too() -> None:
    model = attach()
    model.peft_config["default"].target_modules = EVIL
    with pytest.raises(ArtifactError, match="target_modules"):
        lora.held_adapter(model, None, MANIFEST)


@pytest.mark.parametrize("names", ["all-linear", "up_proj", ["up_proj", "model.layers.0.mlp.down_proj"]])
def test_names_of_modules_are_read(tmp_path: Path, names: Any) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": names}))
    assert lora.read_adapter(tmp_path / "a")[0]["target_modules"] == names


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=lora.stamp(MANIFEST))


A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({A: t[A] * float("nan")}), "NaN or infinity"),
        (lambda t: t.pop(A), "no counterpart"),
        (lambda t: t.update({A: t[A].T.contiguous()}), "no matrix of rank 4"),
        (lambda t: t.update({A: t[A].int()}), "no matrix of rank 4"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[A] + 1}), "of no block"),
        (lambda t: t.update({A.replace("lora_A", "lora_C"): t[A] + 1}), "no LoRA tensor"),
        (lambda t: [t.update({k.replace("layers.1.", "layers.6."): t.pop(k)}) for k in list(t)], "block 6"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    write(tmp_path / "a")
    rewrite(tmp_path / "a", change)
    with pytest.raises(ArtifactError, match=message):
        lora.read_adapter(tmp_path / "a")


@pytest.mark.parametrize("name", ["fedproxy.json", "adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_or_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=name):
        lora.read_adapter(tmp_path / "a")
    file.unlink()
    with pytest.raises(ArtifactError, match=name):
        lora.read_adapter(tmp_path / "a")


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
