import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fedproxy.checkpoint_files import open_checkpoint
from fedproxy.compression.prune import check_proxy, prune
from fedproxy.errors import ArtifactError, ResourceError, UsageError
from fedproxy.models.families import keep_blocks
from fedproxy.models.source import open_source
from tests.conftest import FAMILIES, MULTIMODAL, make_model, make_tokenizer
from tests.in_memory import skipping

Checkpoint = Callable[..., Path]
KEEP = [0, 3, 4]
IDS = torch.arange(40).reshape(2, 20)


def write(llm: Path, out: Path, keep: list[int] = KEEP) -> Path:
    source = open_source(llm)
    out.mkdir()
    prune(source, keep, out)
    check_proxy(source, keep, out)
    return out


def config_of(folder: Path) -> dict[str, Any]:
    record = AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in record.items() if key not in ("_name_or_path", "transformers_version")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_copied_bytes_is_the_file_that_the_model_in_memory_saves(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    make_model(family, dtype=dtype).save_pretrained(tmp_path / "llm")
    proxy = write(tmp_path / "llm", tmp_path / "proxy")
    keep_blocks(AutoModelForCausalLM.from_pretrained(tmp_path / "llm"), KEEP).save_pretrained(tmp_path / "oracle")
    assert (proxy / "model.safetensors").read_bytes() == (tmp_path / "oracle" / "model.safetensors").read_bytes()
    assert config_of(proxy) == config_of(tmp_path / "oracle")


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_stay_shards(family: str, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path / "llm", max_shard_size="40KB")
    make_model(family).save_pretrained(tmp_path / "one")
    proxy = write(tmp_path / "llm", tmp_path / "proxy")
    whole = write(tmp_path / "one", tmp_path / "whole")
    assert len(open_checkpoint(proxy).shards) > 1
    found, expected = open_checkpoint(proxy).tensors, load_file(whole / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].read(), expected[name]) for name in expected)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(proxy)(IDS).logits
        assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(whole)(IDS).logits)


@pytest.mark.parametrize("family", MULTIMODAL)
def test_of_a_multimodal_model_the_text_decoder_alone_is_written(
    family: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    proxy = write(tiny_checkpoint(family), tmp_path / "proxy")
    model = AutoModelForCausalLM.from_pretrained(proxy)
    assert not any("vision" in name for name in open_checkpoint(proxy).tensors)
    whole = make_model(family).eval()
    with torch.no_grad(), skipping(whole, [1, 2, 5]):
        expected = whole(IDS, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(model(IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_copied_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "llm")
    file = tmp_path / "llm" / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    proxy = write(tmp_path / "llm", tmp_path / "proxy")
    before, after = load_file(file), load_file(proxy / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    name = "model.layers.{}.mlp.up_proj.weight"
    for number, block in enumerate(KEEP):
        old, new = (tensors[name.format(i)].view(torch.uint8) for tensors, i in ((before, block), (after, number)))
        assert torch.equal(old, new)


def test_tied_weights_stay_tied(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    for tied in (True, False):
        proxy = write(tiny_checkpoint(tie_word_embeddings=tied), tmp_path / str(tied))
        assert ("lm_head.weight" in open_checkpoint(proxy).tensors) != tied
        model = AutoModelForCausalLM.from_pretrained(proxy)
        assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("smollm3", "no_rope_layers", [1, 1, 0]),
        ("gemma2", "layer_types", ["sliding_attention", "full_attention", "sliding_attention"]),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention", "sliding_attention"]),
    ],
)
def test_lists_that_the_config_leaves_to_be_derived_are_written_out(
    family: str, name: str, expected: list[object], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm = Path(shutil.copytree(tiny_checkpoint(family), tmp_path / "llm"))
    config = json.loads((llm / "config.json").read_text())
    if name == "layer_types":
        del config["layer_types"]
        (llm / "config.json").write_text(json.dumps(config))
    proxy = write(llm, tmp_path / "proxy")
    assert json.loads((proxy / "config.json").read_text())[name] == expected


def test_what_lies_beside_the_weights_comes_along_to_the_byte(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "llm"))
    make_tokenizer().save_pretrained(llm)
    (llm / "chat_template.jinja").write_text("{{ messages }}")
    (llm / "training_data.txt").write_text("secret")
    proxy = write(llm, tmp_path / "proxy")
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {file.name for file in proxy.iterdir()} == {"config.json", "model.safetensors", *names}
    assert all((proxy / name).read_bytes() == (llm / name).read_bytes() for name in names)


@pytest.mark.parametrize("keep", [[], [0, 0], [2, 1], [-1], [0, 6]])
def test_impossible_choices_are_refused(keep: list[int], tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rising list"):
        prune(open_source(tiny_checkpoint()), keep, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_names_blocks_by_number_is_refused(tmp_path: Path) -> None:
    """Qwen3-MoE can say which blocks are dense; the numbers would mean other blocks in the proxy."""
    make_model("qwen3_moe", mlp_only_layers=[3], intermediate_size=16).save_pretrained(tmp_path / "llm")
    with pytest.raises(ArtifactError, match="experts"):
        write(tmp_path / "llm", tmp_path / "proxy")


def test_the_proof_fails_where_a_byte_is_wrong(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The check runs the written files: weights of another block in place of one's own are noticed."""
    source = open_source(tiny_checkpoint("smollm3"))
    out = tmp_path / "proxy"
    out.mkdir()
    prune(source, KEEP, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "no_rope_layers": [1, 0, 0]}))
    with pytest.raises(ArtifactError, match="depends on its position"):
        check_proxy(source, KEEP, out)


def test_a_full_disk_is_told_before_anything_is_written(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="GB are needed"):
        prune(open_source(tiny_checkpoint()), KEEP, tmp_path)
    assert list(tmp_path.iterdir()) == []
