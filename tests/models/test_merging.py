import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedproxy.checkpoint_files import open_checkpoint
from fedproxy.errors import ArtifactError
from fedproxy.models import lora
from fedproxy.models.families import blocks_path
from fedproxy.models.lora import check_fits
from fedproxy.models.merging import merge_adapter, stored_names, stored_weights
from fedproxy.models.source import open_source
from tests.conftest import FAMILIES, MULTIMODAL, make_model

P = "base_model.model.model.layers."
IDS = torch.arange(24).reshape(2, 12)
Checkpoint = Callable[..., Path]


def pair(block: int, module: str, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{P}{block}.{module}.lora_A.weight": torch.randn(2, inputs, generator=generator),
        f"{P}{block}.{module}.lora_B.weight": torch.randn(outputs, 2, generator=generator),
    }


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (pair(6, "mlp.up_proj", 32, 48), {}, "no linear layer"),
        (pair(0, "mlp.sideways", 32, 48), {}, "no linear layer"),
        (pair(0, "mlp", 32, 48), {}, "no linear layer"),
        (pair(0, "mlp.up_proj", 33, 48), {}, "32 inputs and 48 outputs"),
        (pair(0, "mlp.up_proj", 32, 47), {}, "32 inputs and 48 outputs"),
        (pair(0, "mlp.up_proj", 48, 32), {"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_tensors_that_fit_no_layer_are_refused(
    tensors: dict[str, torch.Tensor], config: dict[str, object], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        check_fits(make_model(), tensors, config)


def adapter(llm: Path, *, r: int = 4, scale: float = 0.1, **options: Any) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """A random adapter on a model that transformers loads, and its tensors."""
    model = lora.attach(AutoModelForCausalLM.from_pretrained(llm), r=r, alpha=6, dropout=0.0, seed=0, **options)
    generator = torch.Generator().manual_seed(5)
    state = {
        name: tensor if "lora_A" in name else scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in lora.adapter_state(model).items()
    }
    lora.set_adapter_state(model, state)
    return model.eval(), state


def merged(llm: Path, out: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    out.mkdir()
    merge_adapter(open_source(llm), tensors, config, out)
    return out


def assert_same_weights(found: Path, expected: Any) -> None:
    state, wanted = AutoModelForCausalLM.from_pretrained(found).state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_as_peft_merges_to_the_bit_on_every_family(
    family: str, dtype: torch.dtype, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm = tiny_checkpoint(family, dtype=dtype)
    model, tensors = adapter(llm)
    config = lora.adapter_config(model)
    out = merged(llm, tmp_path / "out", tensors, config)
    assert_same_weights(out, model.merge_and_unload())
    assert (out / "config.json").read_bytes() == (llm / "config.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (llm / "tokenizer.json").read_bytes()


def sharded(llm: Path, out: Path) -> Path:
    shutil.copytree(llm, out)
    (out / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(llm).save_pretrained(out, max_shard_size="40KB")
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_shards_stay_as_they_are(family: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = sharded(tiny_checkpoint(family), tmp_path / "llm")
    model, tensors = adapter(llm, layers=[1, 4])
    out = merged(llm, tmp_path / "out", tensors, lora.adapter_config(model))
    before, after = open_checkpoint(llm), open_checkpoint(out)
    assert len(before.shards) > 2
    layout = [[{n: (s.file.name, s.dtype, s.shape) for n, s in x.items()} for x in c.shards] for c in (before, after)]
    assert layout[0] == layout[1]
    assert_same_weights(out, model.merge_and_unload())
    changed = {n for n, s in before.tensors.items() if not torch.equal(s.read(), after.tensors[n].read())}
    assert changed == {stored_names(open_source(llm))[f"{n[17:-14]}.weight"] for n in tensors if "lora_A" in n}


def test_what_is_not_touched_is_copied_to_the_byte(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """NaN payloads and negative zeros too, in a tensor of any type."""
    llm = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "llm"))
    tensors = load_file(llm / "model.safetensors")
    odd = torch.arange(260 * 32, dtype=torch.int32).reshape(260, 32).view(torch.float32)
    extra = {"extra.scales": torch.full((3,), 2.0).to(torch.float8_e4m3fn), "extra.count": torch.tensor(7)}
    save_file({**tensors, "lm_head.weight": odd, **extra}, llm / "model.safetensors", metadata={"format": "pt"})
    out = merged(llm, tmp_path / "out", pair(3, "mlp.up_proj", 32, 48), {"r": 2, "lora_alpha": 3})
    before, after = open_checkpoint(llm).tensors, open_checkpoint(out).tensors
    same = {n for n, s in before.items() if bytes_of(s) == bytes_of(after[n])}
    assert before.keys() - same == {"model.layers.3.mlp.up_proj.weight"}


def bytes_of(stored: Any) -> bytes:
    with open(stored.file, "rb") as file:
        file.seek(stored.begin)
        return file.read(stored.end - stored.begin)


def test_a_zero_task_vector_copies_to_the_byte(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint(dtype=torch.bfloat16)
    model, tensors = adapter(llm, scale=0.0)
    out = merged(llm, tmp_path / "out", tensors, lora.adapter_config(model))
    assert (out / "model.safetensors").read_bytes() == (llm / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("llama", "model."), ("opt", "model.")])
def test_checkpoints_saved_without_the_name_of_the_base_model(
    family: str, prefix: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    whole = tiny_checkpoint(family)
    llm = Path(shutil.copytree(whole, tmp_path / "llm"))
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(whole / "model.safetensors").items()}
    save_file(tensors, llm / "model.safetensors", metadata={"format": "pt"})
    model, state = adapter(whole)
    config = lora.adapter_config(model)
    out = merged(llm, tmp_path / "out", state, config)
    assert load_file(out / "model.safetensors").keys() == tensors.keys()
    assert_same_weights(out, model.merge_and_unload())
    names = stored_names(open_source(llm))
    assert names.keys() >= {n for n, _ in make_model(family).named_parameters()}
    assert set(names.values()) == tensors.keys()


@pytest.mark.parametrize("family", MULTIMODAL)
def test_only_the_text_tower_of_a_multimodal_model_is_touched(
    family: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm = tiny_checkpoint(family)
    source = open_source(llm)
    tensors = pair(5, "mlp.up_proj", 32, 48)
    out = merged(llm, tmp_path / "out", tensors, {"r": 2, "lora_alpha": 3})
    before, after = load_file(llm / "model.safetensors"), load_file(out / "model.safetensors")
    place = f"{source.stored_path}.5.mlp.up_proj.weight"
    assert {name for name in before if not torch.equal(before[name], after[name])} == {place}
    a, b = tensors.values()
    assert torch.equal(after[place], before[place] + (b @ a) * 1.5)


def test_a_sum_that_overflows_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = {name: 1e4 * tensor for name, tensor in pair(0, "mlp.up_proj", 32, 48).items()}
    with pytest.raises(ArtifactError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        merged(tiny_checkpoint(dtype=torch.float16), tmp_path / "out", tensors, {"r": 2, "lora_alpha": 2})
    merged(tiny_checkpoint(dtype=torch.bfloat16), tmp_path / "wide", tensors, {"r": 2, "lora_alpha": 2})


@pytest.mark.parametrize("large", [6e4, 3e38])
def test_large_sums_that_do_not_overflow_are_no_error(
    large: float, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    dtype = torch.float16 if large < 1e5 else torch.bfloat16
    llm = Path(shutil.copytree(tiny_checkpoint(dtype=dtype), tmp_path / "llm"))
    weights = load_file(llm / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].fill_(large)
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    out = merged(llm, tmp_path / "out", pair(0, "mlp.up_proj", 32, 48), {"r": 2, "lora_alpha": 2})
    assert bool(torch.isfinite(load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]).all())


def test_a_weight_of_eight_bits_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = Path(shutil.copytree(tiny_checkpoint(dtype=torch.bfloat16), tmp_path / "llm"))
    weights = load_file(llm / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, llm / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"F8_E4M3.*too few bits"):
        merged(llm, tmp_path / "out", pair(0, "mlp.up_proj", 32, 48), {"r": 2, "lora_alpha": 2})
    merged(llm, tmp_path / "other", pair(1, "mlp.up_proj", 32, 48), {"r": 2, "lora_alpha": 2})


def test_weights_in_another_form_have_no_place(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = open_source(tiny_checkpoint("mixtral"))
    name = "model.layers.0.mlp.experts.down_proj"
    assert name not in stored_names(source)
    assert stored_names(source)["model.layers.0.self_attn.q_proj.weight"] == "model.layers.0.self_attn.q_proj.weight"
    value = {f"base_model.model.{name}": torch.zeros(source.decoder.get_parameter(name).shape)}
    with pytest.raises(ArtifactError, match="as a tensor of its own"):
        merged(source.path, tmp_path / "out", value, {"r": 2, "lora_alpha": 2})


def test_a_tied_head_lies_where_the_embedding_lies(tiny_checkpoint: Checkpoint) -> None:
    source = open_source(tiny_checkpoint("gpt2"))
    found = stored_weights(source)
    assert found["lm_head.weight"] == found["transformer.wte.weight"]
    assert blocks_path(source.decoder) == "transformer.h"


def test_bytes_are_told_as_they_are_written(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    told: list[int] = []
    source = open_source(tiny_checkpoint())
    merge_adapter(source, pair(0, "mlp.up_proj", 32, 48), {"r": 2, "lora_alpha": 2}, tmp_path, on_bytes=told.append)
    assert told[-1] == source.files.bytes
    assert len(told) > 1
    assert told == sorted(told)


def test_tied_weights_become_two_where_they_differ(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = sharded(tiny_checkpoint("gemma3_text"), tmp_path / "llm")
    model = make_model("gemma3_text")
    new = torch.randn(260, 32, generator=torch.Generator().manual_seed(0))
    config = {"r": 2, "lora_alpha": 2}
    head, embedding = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"
    for number, tensors in enumerate(({head: new}, {embedding: new}, {head: new, embedding: new + 1})):
        out = merged(llm, tmp_path / str(number), tensors, config)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        found = AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(found.lm_head.weight, tensors.get(head, model.lm_head.weight))
        assert torch.equal(found.model.embed_tokens.weight, tensors.get(embedding, model.lm_head.weight))
    old = model.lm_head.weight.detach()
    for number, tensors in enumerate(({head: new, embedding: new}, {head: old}, {embedding: new, head: new})):
        out = merged(llm, tmp_path / f"same-{number}", tensors, config)
        assert (out / "config.json").read_bytes() == (llm / "config.json").read_bytes()
        assert "lm_head.weight" not in open_checkpoint(out).tensors
        found = AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(found.lm_head.weight, tensors[head])
