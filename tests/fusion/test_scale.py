import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedproxy.adapter_files import read_adapter, write_adapter
from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import model_identity
from fedproxy.errors import ArtifactError
from fedproxy.fusion import GRID, fuse
from fedproxy.fusion.plug_in import TaskVector, rekey_adapter
from fedproxy.fusion.scale import best_scale, scale_curve
from fedproxy.models import lora
from fedproxy.models.block_stream import BlockStream
from fedproxy.models.merging import merge_adapter, stored_weights
from fedproxy.models.source import open_source
from fedproxy.models.text_batches import batches
from tests.conftest import make_model
from tests.fusion.test_fuse import make_adapter

Checkpoint = Callable[..., Path]
TEXTS = ["Nobody knows.", "The committee met on Tuesday and adjourned.", "x", "A third text, of some length, too."]


def direct_loss(model: Any, tokenizer: Any) -> float:
    """Mean loss of plain forward passes, text by text."""
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"][:20]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return total / count


def text_of(llm: Path) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(llm)
    return tokenizer, batches(tokenizer, TEXTS, max_length=20, batch_size=3)


@pytest.mark.parametrize("placed", ["files", "memory"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "opt", "bloom"])
def test_the_curve_is_that_of_peft_models_with_that_scale(
    family: str, placed: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm = tiny_checkpoint(family)
    _, adapter = make_adapter(llm, tmp_path / "adapter", layers=[1, 2])
    config, tensors, manifest = read_adapter(adapter)
    source = open_source(llm)
    vector = TaskVector(rekey_adapter(tensors, manifest.layer_map, source.blocks_path), {}, {})
    tokenizer, text = text_of(llm)
    stream = BlockStream(source.decoder, source) if placed == "files" else BlockStream(lora.load_model(llm))
    done: list[int] = []
    curve = scale_curve(stream, vector, config, text, scales=(0.0, 0.5, 1.0, 2.0), on_block=done.append)
    assert done == list(range(6))
    for scale, loss in curve:
        tuned = lora.load_with_adapter(llm, fuse(llm, adapter, tmp_path / f"a{scale}", scale=scale))
        assert loss == pytest.approx(direct_loss(tuned, tokenizer), abs=1e-5)
    assert curve[0][1] == pytest.approx(direct_loss(make_model(family), tokenizer), abs=1e-5)
    assert len({round(loss, 4) for _, loss in curve}) == 4
    again = scale_curve(stream, vector, config, text, scales=(0.0, 0.5, 1.0, 2.0))
    assert again == curve


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_the_curve_with_trained_weights_outside_the_blocks(
    family: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The embedding changes what enters the blocks, norm and head what leaves them; tied or not."""
    llm = tiny_checkpoint(family)
    source = open_source(llm)
    generator = torch.Generator().manual_seed(0)
    names = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.2.input_layernorm.weight"]
    stored = stored_weights(source)
    own = {f"base_model.model.{name}": stored[name] for name in names}
    tensors = {n: s.read() + 0.3 * torch.randn(s.shape, generator=generator) for n, s in own.items()}
    config = {"r": 4, "lora_alpha": 4, "modules_to_save": ["embed_tokens", "norm"]}
    vector = TaskVector(tensors, own, own)
    tokenizer, text = text_of(llm)
    curve = scale_curve(BlockStream(source.decoder, source), vector, config, text, scales=(0.0, 0.5, 1.0))
    for scale, loss in curve:
        out = tmp_path / str(scale)
        out.mkdir()
        merge_adapter(source, vector.at(scale), config, out)
        assert loss == pytest.approx(direct_loss(AutoModelForCausalLM.from_pretrained(out), tokenizer), abs=1e-5)
    assert len({round(loss, 4) for _, loss in curve}) == 3


def towards(llm: Path, target: Path, out: Path, scale: float) -> Path:
    """An adapter that makes `llm` the model `target` when it is plugged in at `scale`."""
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (llm, target))
    proxy = lora.attach(ours, r=32, alpha=32, dropout=0.0, targets=["mlp.up_proj", "self_attn.q_proj"], seed=0)
    state = lora.adapter_state(proxy)
    wanted = theirs.state_dict()
    base = AutoModelForCausalLM.from_pretrained(llm).state_dict()
    for name in [name for name in state if ".lora_A." in name]:
        weight = f"{name.removeprefix('base_model.model.').removesuffix('.lora_A.weight')}.weight"
        state[name] = torch.eye(32)
        state[name.replace("lora_A", "lora_B")] = (wanted[weight] - base[weight]) / scale
    manifest = Manifest("proxy-adapter", model_identity(llm), 6, list(range(6)), seed=4)
    write_adapter(out, lora.adapter_config(proxy), state, manifest)
    return out


@pytest.fixture
def memorised(tiny_checkpoint: Checkpoint, tmp_path: Path) -> tuple[Path, Path, Path]:
    """An LLM, the same one after it learned a text by heart in some of its weights, and the text."""
    llm, target = tiny_checkpoint(), tmp_path / "target"
    text = tmp_path / "public.jsonl"
    text.write_text("\n".join(json.dumps({"prompt": "Say it: ", "completion": t}) for t in TEXTS[:2]))
    model = AutoModelForCausalLM.from_pretrained(llm)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    weights = [p for n, p in model.named_parameters() if "up_proj" in n or "q_proj" in n]
    optimizer = torch.optim.Adam(weights, lr=0.01)
    ids = [torch.tensor([tokenizer(f"Say it: {t}")["input_ids"]]) for t in TEXTS[:2]]
    for _ in range(15):
        sum(model(x, labels=x).loss for x in ids).backward()
        optimizer.step()
        model.zero_grad()
    model.save_pretrained(target)
    return llm, target, text


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_the_best_scale_is_found_and_written_down(
    scale: float, memorised: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Plugged in at `scale` the adapter makes the trained model; the others are half-way or beyond."""
    llm, target, text = memorised
    adapter = towards(llm, target, tmp_path / "adapter", scale)
    for form, out in (("adapter", "chosen"), ("checkpoint", "c")):
        settings = Manifest.read(fuse(llm, adapter, tmp_path / out, form=form, scale="auto", public=text)).settings
        assert settings["scale"] == scale
        curve = dict(map(tuple, settings["scale_curve"]))
        assert tuple(curve) == GRID
        assert min(curve, key=lambda factor: curve[factor]) == scale
        assert curve[0.0] > curve[0.25] > curve[scale]
        assert len(settings["public_sha256"]) == 64
    plain = fuse(llm, adapter, tmp_path / "plain", scale=scale) / "adapter_model.safetensors"
    assert plain.read_bytes() == (tmp_path / "chosen" / "adapter_model.safetensors").read_bytes()


def test_zero_is_only_a_reference() -> None:
    assert best_scale([(0.0, 1.0), (0.5, 3.0), (1.0, 2.0), (2.0, 2.0)]) == 1.0
    assert best_scale([(0.0, 1.0), (0.5, 3.0), (1.0, math.inf)]) == 0.5
    with pytest.raises(ArtifactError, match="not finite"):
        best_scale([(0.0, 1.0), (1.0, math.inf)])


def test_text_without_a_token_to_predict_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    (tmp_path / "short.txt").write_text("x\n\ny")
    with pytest.raises(ArtifactError, match="no token to predict"):
        fuse(llm, adapter, tmp_path / "out", scale="auto", public=tmp_path / "short.txt")
    with pytest.raises(ArtifactError, match="cannot be read"):
        fuse(llm, adapter, tmp_path / "out", scale="auto", public=tmp_path / "absent.txt")
    assert not (tmp_path / "out").exists()
