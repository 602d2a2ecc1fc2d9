import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from fedproxy.adapter_checks import stamp
from fedproxy.adapter_files import read_adapter
from fedproxy.errors import ArtifactError
from tests.models.test_lora import EVIL, MANIFEST, write


def test_writing_is_reproducible_and_reading_gives_it_back(tmp_path: Path) -> None:
    tensors = write(tmp_path / "a")
    write(tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    config, found, manifest = read_adapter(tmp_path / "a")
    assert manifest == MANIFEST
    assert config["r"] == 4
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_an_adapter_with_all_of_pefts_keys_is_still_read(tmp_path: Path) -> None:
    write(tmp_path / "a")
    config, _, _ = read_adapter(tmp_path / "a")
    full = {**LoraConfig().to_dict(), **config}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(full))
    assert read_adapter(tmp_path / "a")[0] == json.loads(json.dumps(full))


@pytest.mark.parametrize(
    "change",
    [{"kind": "llm-adapter"}, {"llm_sha256": "1" * 64}, {"llm_blocks": 13}, {"layer_map": [0, 1, 3, 7, 9, 11]}],
)
def test_an_exchanged_manifest_is_noticed(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path / "a")
    replace(MANIFEST, **change).write(tmp_path / "a")
    with pytest.raises(ArtifactError, match="do not belong together"):
        read_adapter(tmp_path / "a")


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
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    "value", [EVIL, [EVIL], ["up_proj", EVIL], "a" * 300, ["a"] * 100_001, [5], {"a": 1}, r".*\.q"]
)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern", "modules_to_save"])
def test_what_peft_would_match_as_a_pattern_is_refused_by_its_key(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ArtifactError, match=key):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_parameters"])
def test_ranks_by_pattern_are_refused_by_their_key(tmp_path: Path, key: str) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: {EVIL: 2}}))
    with pytest.raises(ArtifactError, match=key):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("names", ["all-linear", "up_proj", ["up_proj", "model.layers.0.mlp.down_proj"]])
def test_names_of_modules_are_read(tmp_path: Path, names: Any) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": names}))
    assert read_adapter(tmp_path / "a")[0]["target_modules"] == names


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=stamp(MANIFEST))


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
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("name", ["fedproxy.json", "adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_or_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=name):
        read_adapter(tmp_path / "a")
    file.unlink()
    with pytest.raises(ArtifactError, match=name):
        read_adapter(tmp_path / "a")
