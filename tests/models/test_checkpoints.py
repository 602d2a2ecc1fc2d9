import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedproxy.errors import ArtifactError
from fedproxy.models.checkpoints import load_model, load_skeleton, load_tokenizer, save_checkpoint

Checkpoint = Callable[..., Path]


@pytest.fixture
def damaged(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint(), tmp_path / "damaged"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_keeps_its_own_dtype_and_bits(
    tiny_checkpoint: Checkpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    source = tiny_checkpoint(dtype=dtype)
    model = load_model(source)
    assert model.dtype == dtype
    assert not model.training
    save_checkpoint(tmp_path / "copy", model, source)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "copy" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_skeleton_has_names_and_shapes_but_no_weights(tiny_checkpoint: Checkpoint) -> None:
    skeleton = load_skeleton(tiny_checkpoint())
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    weights = {name: p.shape for name, p in load_model(tiny_checkpoint()).named_parameters()}
    assert {name: p.shape for name, p in skeleton.named_parameters()} == weights


def test_a_generation_config_that_transformers_finds_inconsistent_is_kept(damaged: Path, tmp_path: Path) -> None:
    record = json.loads((damaged / "generation_config.json").read_text())
    (damaged / "generation_config.json").write_text(json.dumps({**record, "temperature": 0.9, "top_p": 0.6}))
    save_checkpoint(tmp_path / "copy", load_model(damaged), damaged)
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text())["top_p"] == 0.6


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", "absent-model", tmp_path):
        with pytest.raises(ArtifactError, match=r"is no (checkpoint|Hugging Face checkpoint)"):
            load_model(path)


def test_truncated_weights(damaged: Path) -> None:
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="truncated"):
        load_model(damaged)


def test_weights_that_lack_a_tensor_are_not_filled_with_noise(damaged: Path) -> None:
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.layers\.3\.mlp\.up_proj\.weight"):
        load_model(damaged)


def test_weights_of_another_shape(damaged: Path) -> None:
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight"):
        load_model(damaged)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-model"}', "{}"])
def test_a_config_that_describes_no_model(damaged: Path, text: str) -> None:
    (damaged / "config.json").write_text(text)
    with pytest.raises(ArtifactError):
        load_model(damaged)
    with pytest.raises(ArtifactError):
        load_skeleton(damaged)


def test_a_checkpoint_without_tokenizer(damaged: Path) -> None:
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ArtifactError, match="tokenizer"):
        load_tokenizer(damaged)


def test_a_missing_tokenizer_is_told_from_a_broken_one(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_checkpoint() / "config.json", bare)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        load_tokenizer(bare)
    (bare / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="tokenizer"):
        load_tokenizer(bare)
