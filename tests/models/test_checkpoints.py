import base64
import fnmatch
import importlib.util
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedproxy.errors import ArtifactError
from fedproxy.models.checkpoints import (
    copy_tokenizer,
    hub_id,
    load_model,
    load_skeleton,
    load_tokenizer,
    save_checkpoint,
)
from fedproxy.side_files import TOKENIZER_FILES
from tests.test_side_files import STRANGERS

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


def test_modes_follow_the_umask(tiny_checkpoint: Checkpoint, tmp_path: Path, umask: int) -> None:
    (tmp_path / "copy").mkdir()
    save_checkpoint(tmp_path / "copy", load_model(tiny_checkpoint()), tiny_checkpoint())
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "copy").iterdir()} == {0o666 & ~umask}


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


@pytest.fixture
def sharded(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    load_model(tiny_checkpoint()).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def promise(checkpoint: Path, name: str) -> None:
    """Let the index name a tensor that no shard holds."""
    file = checkpoint / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][name] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))


def test_a_tensor_that_no_shard_holds_is_missed_only_where_the_model_needs_it(
    sharded: Path, tiny_checkpoint: Checkpoint
) -> None:
    promise(sharded, "mtp.layers.0.weight")
    whole = load_model(tiny_checkpoint()).state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in load_model(sharded).state_dict().items())
    needed = "model.layers.3.mlp.up_proj.weight"
    for file in sharded.glob("*.safetensors"):
        held = load_file(file)
        if held.pop(needed, None) is not None:
            save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=re.escape(needed)):
        load_model(sharded)


def test_every_file_that_transformers_tokenizers_read_travels() -> None:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    found = {"tekken.json"}
    for file in Path(spec.origin).parent.rglob("tokenization_*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", file.read_text(encoding="utf-8"), re.DOTALL):
            found.update(re.findall(r':\s*"([^"]+)"', table))
    assert len(found) > 15
    assert [name for name in found if not any(fnmatch.fnmatch(name, one) for one in TOKENIZER_FILES)] == []


def test_only_files_travel_and_only_those_of_the_tokenizer(damaged: Path, tmp_path: Path) -> None:
    (damaged / "tokenizer.model").mkdir()
    (damaged / "spiece.model").symlink_to(damaged / "nowhere")
    os.mkfifo(damaged / "merges.txt")
    (damaged / "tekken.json").write_text("{}")
    for name in STRANGERS:
        (damaged / name).write_text("stays")
    with socket.socket(socket.AF_UNIX) as listener:
        place = os.getcwd()
        os.chdir(damaged)
        listener.bind("vocab.txt")
        os.chdir(place)
        (tmp_path / "proxy").mkdir()
        copy_tokenizer(damaged, tmp_path / "proxy")
    assert {file.name for file in (tmp_path / "proxy").iterdir()} == {
        "generation_config.json",
        "tekken.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    load_tokenizer(tmp_path / "proxy")


@pytest.mark.parametrize("default", [True, False])
def test_named_chat_templates_travel_in_a_plain_file(damaged: Path, tmp_path: Path, default: bool) -> None:
    tokenizer = load_tokenizer(damaged)
    named = {"tool_use": "tools: {{ messages[0].content }}", "rag": "rag: {{ messages[0].content }}"}
    tokenizer.chat_template = {**named, **({"default": "plain: {{ messages[0].content }}"} if default else {})}
    tokenizer.save_pretrained(damaged)
    assert (damaged / "additional_chat_templates" / "rag.jinja").is_file()
    (tmp_path / "proxy").mkdir()
    copy_tokenizer(damaged, tmp_path / "proxy")
    assert load_tokenizer(tmp_path / "proxy").chat_template == load_tokenizer(damaged).chat_template
    assert all(file.is_file() for file in (tmp_path / "proxy").iterdir())


def test_what_prepares_pictures_goes_with_the_whole_llm_alone(damaged: Path, tmp_path: Path) -> None:
    (damaged / "preprocessor_config.json").write_text("{}")
    for whole in (True, False):
        (tmp_path / str(whole)).mkdir()
        copy_tokenizer(damaged, tmp_path / str(whole), whole=whole)
        assert (tmp_path / str(whole) / "preprocessor_config.json").is_file() == whole


def test_a_place_in_the_hubs_cache_has_an_id() -> None:
    assert hub_id(Path("/home/me/.cache/huggingface/hub/models--a--b-c/snapshots/f00")) == "a/b-c"
    assert hub_id(Path("/cache/models--gpt2/snapshots/f00")) == "gpt2"
    assert hub_id(Path("/data/models--a--b")) is None
    assert hub_id(Path("llm")) is None


def test_a_tokenizer_that_is_a_tekken_file_alone_travels(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("mistral"), source, ignore=shutil.ignore_patterns("tokenizer*"))
    special = [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(("<unk>", "<s>", "</s>"))]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)]
    numbers = {"num_vocab_tokens": 256, "default_vocab_size": 259, "default_num_special_tokens": 3, "version": "v3"}
    record = {"config": {"pattern": r"[^\s]+|\s+", **numbers}, "vocab": vocab, "special_tokens": special}
    (source / "tekken.json").write_text(json.dumps(record))
    (tmp_path / "proxy").mkdir()
    shutil.copy(source / "config.json", tmp_path / "proxy")
    copy_tokenizer(source, tmp_path / "proxy")
    ids = load_tokenizer(source)("a proxy").input_ids
    assert len(ids) >= 7
    assert load_tokenizer(tmp_path / "proxy")("a proxy").input_ids == ids
