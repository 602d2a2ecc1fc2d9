import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from fedproxy.errors import ArtifactError
from fedproxy.models.checkpoints import load_model
from fedproxy.models.source import open_source
from tests.conftest import BLOCKS, FAMILIES, MULTIMODAL

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("family", [*FAMILIES, *MULTIMODAL])
def test_every_tensor_is_of_a_block_or_outside_them_and_none_is_loaded(
    family: str, tiny_checkpoint: Checkpoint
) -> None:
    source = open_source(tiny_checkpoint(family))
    assert source.count == BLOCKS
    assert source.multimodal == (family in MULTIMODAL)
    assert all(parameter.is_meta for parameter in source.whole.parameters())
    parts = [source.outer_tensors(), *(source.block_tensors(number) for number in range(BLOCKS))]
    assert len({len(part) for part in parts[1:]}) == 1
    names = [name for part in parts for name in part]
    assert len(names) == len(set(names))
    if family in MULTIMODAL:
        assert not any("vision" in name or "projector" in name for name in names)
    else:
        assert set(names) == set(load_file(source.path / "model.safetensors"))


@pytest.mark.parametrize("family", MULTIMODAL)
def test_the_text_decoder_of_a_multimodal_model(family: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its tensors under their names there, with the text configuration, are a checkpoint that computes the same."""
    source = open_source(tiny_checkpoint(family))
    whole = load_file(source.path / "model.safetensors")
    named = {source.decoder_name(name): tensor for name, tensor in whole.items()}
    save_file({k: v for k, v in named.items() if k}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source.decoder.config.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(ids).logits, load_model(source.path)(ids).logits)


@pytest.mark.parametrize(("family", "prefix"), [("llama", "model."), ("gpt2", "transformer.")])
def test_checkpoints_saved_without_the_head(
    family: str, prefix: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """GPT-2's own files name their blocks h.0, h.1, ..."""
    llm = Path(shutil.copytree(tiny_checkpoint(family), tmp_path / "llm"))
    tensors = load_file(llm / "model.safetensors")
    save_file({name.removeprefix(prefix): t for name, t in tensors.items()}, llm / "model.safetensors")
    source = open_source(llm)
    assert f"{prefix}{source.stored_path}" == source.blocks_path
    assert all(len(source.block_tensors(number)) > 5 for number in range(BLOCKS))


def edited(llm: Path, folder: Path, **config: Any) -> Path:
    copy = Path(shutil.copytree(llm, folder))
    record = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**record, **config}))
    return copy


@pytest.mark.parametrize("count", [5, 7, 10**9, -1, 2.5, "6", None, True])
def test_a_wrong_block_count_is_refused_before_anything_is_built(
    count: object, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"blocks|describes no language model"):
        open_source(edited(tiny_checkpoint(), tmp_path / "llm", num_hidden_layers=count))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantised_checkpoints_are_refused_with_a_way_out(
    method: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm = edited(tiny_checkpoint(), tmp_path / "llm", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ArtifactError, match=f"quantised \\({method}\\).*dequantise"):
        open_source(llm)


def with_own_code(llm: Path, folder: Path) -> Path:
    """A checkpoint whose configuration and model classes lie in Python files beside it."""
    copy = edited(
        llm,
        folder,
        model_type="own",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    (copy / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return copy


def test_code_of_the_checkpoint_runs_only_if_trusted(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    llm = with_own_code(tiny_checkpoint(), tmp_path / "llm")
    for attempt in (open_source, load_model):
        with pytest.raises(ArtifactError, match="trust_remote_code"):
            attempt(llm)
    source = open_source(llm, trust_remote_code=True)
    assert type(source.decoder).__name__ == "OwnModel"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = load_model(tiny_checkpoint())(ids).logits
        assert torch.equal(load_model(llm, trust_remote_code=True)(ids).logits, expected)


def test_a_known_model_needs_no_trust_even_if_it_brings_code(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = edited(tiny_checkpoint(), tmp_path / "llm", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (llm / "evil.py").write_text("raise SystemExit('ran')")
    for trust in (False, True):
        assert type(open_source(llm, trust_remote_code=trust).decoder).__name__ == "LlamaForCausalLM"


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, decoder_start_token_id=0)
    )
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    for name, model in (("encoder-decoder|language model", t5), ("state-space", mamba)):
        model.save_pretrained(tmp_path / name[:3])
        with pytest.raises(ArtifactError, match=name):
            open_source(tmp_path / name[:3])


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
def test_files_that_lack_a_weight_or_hold_another_shape_are_refused(
    family: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    for change in ("lacks", "shape"):
        llm = Path(shutil.copytree(tiny_checkpoint(family), tmp_path / f"{family}-{change}"))
        tensors = load_file(llm / "model.safetensors")
        name = next(name for name in tensors if name.endswith("3.self_attn.k_proj.weight"))
        tensors[name] = tensors[name][:-1].clone()
        if change == "lacks":
            del tensors[name]
        save_file(tensors, llm / "model.safetensors", metadata={"format": "pt"})
        for attempt in (open_source, load_model):
            with pytest.raises(ArtifactError, match=r"\b1\b.*3\.self_attn\.k_proj\.weight"):
                attempt(llm)
