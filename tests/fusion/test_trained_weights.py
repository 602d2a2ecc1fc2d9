"""Adapters with trained biases and saved modules, from PEFT itself: one step of training on the proxy."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedproxy.adapter_checks import stamp
from fedproxy.adapter_files import read_adapter, write_adapter
from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import model_identity
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.fusion import fuse, serving_note
from fedproxy.models import lora
from fedproxy.models.checkpoints import save_checkpoint
from fedproxy.models.families import blocks, keep_blocks, stored_transposed
from tests.conftest import make_model

Checkpoint = Callable[..., Path]
KEEP = [1, 2, 5]
IDS = torch.arange(24).reshape(2, 12)
SORTS = [
    ("qwen2", {"bias": "lora_only"}),
    ("qwen2", {"bias": "all", "use_rslora": True}),
    ("gpt2", {"bias": "all"}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("llama", {"modules_to_save": ["embed_tokens", "input_layernorm", "norm"]}),
    ("gpt2", {"modules_to_save": ["wte", "ln_1"]}),
    ("gemma3_text", {"modules_to_save": ["lm_head"]}),
    ("gemma3_text", {"modules_to_save": ["embed_tokens"]}),
    ("gemma3_text", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("gemma3_text", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("qwen2", {"bias": "all", "modules_to_save": ["down_proj"]}),
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def trained(proxy: Any, **options: Any) -> PeftModel:
    """A proxy with an adapter after two steps of training."""
    layer = next(m for m in blocks(proxy)[0].modules() if type(m).__name__ in ("Linear", "Conv1D"))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj", "c_attn"],
        fan_in_fan_out=stored_transposed(layer),
        **options,
    )
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        torch.manual_seed(0)
        model = get_peft_model(proxy, config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def write(model: PeftModel, out: Path, llm: Path, **settings: Any) -> Path:
    state = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    whole = AutoModelForCausalLM.from_pretrained(llm)
    manifest = Manifest("proxy-adapter", model_identity(llm), len(blocks(whole)), KEEP, settings=settings)
    write_adapter(out, lora.adapter_config(model), state, manifest)
    return out


@pytest.mark.parametrize(("family", "options"), SORTS)
def test_kept_blocks_of_the_fused_llm_are_the_trained_proxy(
    family: str, options: dict[str, Any], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The oracle: take the kept blocks out of the fused LLM, and the proxy as PEFT trained it must come back."""
    llm = tiny_checkpoint(family)
    model = trained(keep_blocks(AutoModelForCausalLM.from_pretrained(llm), KEEP), **options)
    adapter = write(model, tmp_path / "adapter", llm)
    fused = fuse(llm, adapter, tmp_path / "c", form="checkpoint")
    tuned = fuse(llm, adapter, tmp_path / "a")

    expected, before = logits(model), logits(keep_blocks(make_model(family), KEEP))
    assert not torch.allclose(expected, before, atol=1e-2)
    checkpoint = AutoModelForCausalLM.from_pretrained(fused)
    plain = logits(checkpoint)
    assert torch.allclose(logits(keep_blocks(checkpoint, KEEP)), expected, atol=1e-4)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        on_llm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llm), tuned)
    ours = lora.load_with_adapter(llm, tuned)
    assert torch.allclose(logits(on_llm), plain, atol=1e-4)
    assert torch.equal(logits(on_llm), logits(ours))
    proxy = tmp_path / "proxy"
    save_checkpoint(proxy, keep_blocks(AutoModelForCausalLM.from_pretrained(llm), KEEP), llm)
    Manifest("proxy", model_identity(llm), 6, KEEP).write(proxy)
    assert torch.allclose(logits(lora.load_with_adapter(proxy, adapter)), expected, atol=1e-5)
    assert serving_note(read_adapter(tuned)[0]) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_both_forms_are_the_same_model_to_the_bit(
    scale: float, dtype: torch.dtype, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm = tiny_checkpoint("qwen2", dtype=dtype)
    proxy = keep_blocks(AutoModelForCausalLM.from_pretrained(llm), KEEP)
    model = trained(proxy.float(), bias="all", modules_to_save=["lm_head", "norm", "input_layernorm"])
    adapter = write(model, tmp_path / "adapter", llm)
    fused = fuse(llm, adapter, tmp_path / "c", form="checkpoint", scale=scale)
    tuned = fuse(llm, adapter, tmp_path / "a", scale=scale)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llm), tuned).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(fused).state_dict()
    assert found.keys() == merged.keys()
    assert all(torch.equal(found[name], merged[name]) for name in found)


def test_half_the_task_vector_is_half_the_change(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint("qwen2")
    model = trained(keep_blocks(AutoModelForCausalLM.from_pretrained(llm), KEEP), bias="all", modules_to_save=["norm"])
    adapter = write(model, tmp_path / "adapter", llm)
    states = [
        load_file(fuse(llm, adapter, tmp_path / str(s), form="checkpoint", scale=s) / "model.safetensors")
        for s in (0.0, 0.5, 1.0)
    ]
    before = load_file(llm / "model.safetensors")
    for name in before:
        assert torch.equal(states[0][name], before[name])
        assert torch.allclose(states[1][name] - before[name], (states[2][name] - before[name]) / 2, atol=1e-6)
    changed = {name for name in before if not torch.equal(before[name], states[2][name])}
    assert {"model.norm.weight", "model.layers.2.self_attn.k_proj.bias"} <= changed
    assert not any(f"layers.{i}." in name for name in changed for i in (0, 3, 4))


def healed_proxy(llm: Path, out: Path) -> Path:
    """The proxy, with every weight moved by something that must not reach the LLM."""
    model = keep_blocks(AutoModelForCausalLM.from_pretrained(llm), KEEP)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_checkpoint(out, model, llm)
    Manifest("proxy", model_identity(llm), 6, KEEP, settings={"healed": True}).write(out)
    return out


def test_what_healing_changed_never_reaches_the_llm(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint("qwen2")
    proxy = healed_proxy(llm, tmp_path / "proxy")
    model = trained(
        AutoModelForCausalLM.from_pretrained(proxy), bias="all", modules_to_save=["lm_head", "norm", "input_layernorm"]
    )
    adapter = write(model, tmp_path / "adapter", llm, healed=True)
    fused = fuse(llm, adapter, tmp_path / "c", form="checkpoint", proxy=proxy)
    tuned = fuse(llm, adapter, tmp_path / "a", proxy=proxy)

    own, base = load_file(proxy / "model.safetensors"), load_file(llm / "model.safetensors")
    after, found = model.merge_and_unload().state_dict(), load_file(fused / "model.safetensors")
    for name, tensor in own.items():
        target = name
        for i in reversed(range(3)):
            target = target.replace(f"layers.{i}.", f"layers.{KEEP[i]}.", 1) if f"layers.{i}." in name else target
        assert torch.allclose(found[target], base[target] + (after[name] - tensor), atol=1e-5), name
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llm), tuned).merge_and_unload().state_dict()
    assert all(torch.equal(found[name], merged[name]) for name in found)

    for form in ("adapter", "checkpoint"):
        with pytest.raises(UsageError, match=r"healed proxy.*--proxy"):
            fuse(llm, adapter, tmp_path / "none", form=form)
        with pytest.raises(ArtifactError, match="no proxy"):
            fuse(llm, adapter, tmp_path / "none", form=form, proxy=llm)
    other = healed_proxy(llm, tmp_path / "other")
    replace(Manifest.read(other), layer_map=[0, 2, 5]).write(other)
    with pytest.raises(ArtifactError, match="other blocks"):
        fuse(llm, adapter, tmp_path / "none", proxy=other)


def test_plain_lora_of_a_healed_proxy_needs_no_proxy(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint("llama")
    model = trained(AutoModelForCausalLM.from_pretrained(healed_proxy(llm, tmp_path / "proxy")))
    adapter = write(model, tmp_path / "adapter", llm, healed=True)
    config = read_adapter(fuse(llm, adapter, tmp_path / "a"))[0]
    assert serving_note(config) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"base_model.model.model.norm.bias": torch.ones(32)}), "of no weight"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(260, 31)}), "its weight"),
        (lambda t: t.pop("base_model.model.lm_head.weight"), "lacks the modules_to_save lm_head"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(260, 32)}), "of no block"),
        (lambda t: t.update({"base_model.model.model.layers.0.mlp.gate_proj.weight": torch.ones(48, 32)}), "no LoRA"),
        (lambda t: t.update({"base_model.model.model.layers.3.x.bias": torch.ones(32)}), "of block 3"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.full((260, 32), torch.nan)}), "NaN"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(260, 32).int()}), "no weight"),
    ],
)
def test_weights_that_do_not_belong_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm = tiny_checkpoint("llama")
    model = trained(
        keep_blocks(AutoModelForCausalLM.from_pretrained(llm), KEEP), bias="all", modules_to_save=["lm_head"]
    )
    adapter = write(model, tmp_path / "adapter", llm)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=stamp(Manifest.read(adapter)))
    with pytest.raises(ArtifactError, match=message):
        fuse(llm, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [{"use_dora": True}, {"alora_invocation_tokens": [1]}, {"rank_pattern": {"q_proj": 8}}, {"modules_to_save": "x"}],
)
def test_other_sorts_are_refused_by_name(change: dict[str, Any], tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint("llama")
    model = trained(keep_blocks(AutoModelForCausalLM.from_pretrained(llm), KEEP))
    adapter = write(model, tmp_path / "adapter", llm)
    config, tensors, manifest = read_adapter(adapter)
    write_adapter(adapter, {**config, **change}, tensors, manifest)
    with pytest.raises(ArtifactError, match=next(iter(change))):
        fuse(llm, adapter, tmp_path / "out")
