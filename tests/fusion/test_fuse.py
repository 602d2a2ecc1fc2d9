import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from fedproxy.adapter_files import read_adapter, write_adapter
from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import Stored, model_identity
from fedproxy.errors import ArtifactError, FedproxyError, ResourceError, UsageError
from fedproxy.fusion import fuse
from fedproxy.models import lora
from fedproxy.models.families import blocks, keep_blocks
from fedproxy.models.source import open_source
from tests.conftest import MULTIMODAL, make_model

Checkpoint = Callable[..., Path]
KEEP = [1, 2, 5]
IDS = torch.arange(24).reshape(2, 12)
FAMILIES = ["llama", "gpt2", "opt", "gpt_neox", "bloom", "gemma3_text", "qwen3", "mixtral", "qwen3_moe"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def make_adapter(
    llm: Path, out: Path, *, size: float = 0.1, layers: list[int] | None = None, **config: Any
) -> tuple[PeftModel, Path]:
    """An adapter on the proxy that keeps the blocks KEEP of `llm`, and that proxy with the adapter."""
    whole = AutoModelForCausalLM.from_pretrained(llm)
    count = len(blocks(whole))
    proxy = lora.attach(keep_blocks(whole, KEEP), r=4, alpha=6, dropout=0.1, layers=layers, seed=0).eval()
    generator = torch.Generator().manual_seed(5)
    state = lora.adapter_state(proxy)
    state = {k: t if "lora_A" in k else size * torch.randn(t.shape, generator=generator) for k, t in state.items()}
    lora.set_adapter_state(proxy, state)
    manifest = Manifest("proxy-adapter", model_identity(llm), count, KEEP, settings={"rounds": 3}, seed=9)
    write_adapter(out, {**lora.adapter_config(proxy), **config}, state, manifest)
    return proxy, out


@pytest.mark.parametrize(
    ("family", "dtype", "scale", "rslora"),
    [(family, torch.bfloat16, 0.3, True) for family in FAMILIES]
    + [(family, torch.float32, 0.3, True) for family in ("llama", "gpt2", "mixtral")]
    + [("llama", torch.bfloat16, 1.0, False)],
)
def test_both_forms_are_the_same_model_to_the_bit(
    family: str, dtype: torch.dtype, scale: float, rslora: bool, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm = tiny_checkpoint(family, dtype=dtype)
    _, adapter = make_adapter(llm, tmp_path / "adapter", use_rslora=rslora)
    tuned = fuse(llm, adapter, tmp_path / "a", form="adapter", scale=scale)
    fused = fuse(llm, adapter, tmp_path / "c", form="checkpoint", scale=scale)

    checkpoint = AutoModelForCausalLM.from_pretrained(fused)
    on_llm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llm), tuned)
    unmerged = logits(on_llm)
    merged = on_llm.merge_and_unload()
    found, expected = merged.state_dict(), checkpoint.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert {t.dtype for t in load_file(fused / "model.safetensors").values()} == {dtype}
    if dtype == torch.float32:
        assert torch.allclose(unmerged, logits(checkpoint), atol=1e-4)

    before = AutoModelForCausalLM.from_pretrained(llm).state_dict()
    state = read_adapter(tuned)[1]
    touched = {
        f"{k.removeprefix('base_model.model.').removesuffix('.lora_A.weight')}.weight" for k in state if "lora_A" in k
    }
    assert {name for name in before if not torch.equal(before[name], expected[name])} == touched
    assert {int(name.split(".layers.")[-1].split(".h.")[-1].split(".")[0]) for name in touched} == set(KEEP)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unhealed_proxy_block_with_adapter_is_the_llm_block_with_the_fused_one(
    family: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm = tiny_checkpoint(family)
    proxy, adapter = make_adapter(llm, tmp_path / "adapter")
    tuned = lora.load_with_adapter(llm, fuse(llm, adapter, tmp_path / "a"))
    hidden = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0))
    for i, target in enumerate(KEEP):
        ours = dict(blocks(proxy.get_base_model())[i].named_modules())
        theirs = dict(blocks(tuned.get_base_model())[target].named_modules())
        adapted = [name for name, module in ours.items() if hasattr(module, "lora_A")]
        assert adapted
        for name in adapted:
            inputs = hidden[..., : ours[name].in_features]
            assert torch.equal(ours[name](inputs), theirs[name](inputs))
    restored = keep_blocks(tuned.merge_and_unload(), KEEP)
    assert torch.allclose(logits(restored), logits(proxy), atol=1e-4)
    assert not torch.allclose(logits(restored), logits(keep_blocks(make_model(family), KEEP)), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_zero_adapter_gives_the_llm_to_the_bit(family: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint(family)
    _, adapter = make_adapter(llm, tmp_path / "adapter", size=0.0)
    fused = fuse(llm, adapter, tmp_path / "c", form="checkpoint")
    tuned = fuse(llm, adapter, tmp_path / "a")
    before, after = load_file(llm / "model.safetensors"), load_file(fused / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)) for name in before)
    plain = logits(make_model(family))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(fused)), plain)
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(family), tuned)), plain)


@pytest.mark.parametrize("family", MULTIMODAL)
def test_both_forms_on_the_text_tower_of_a_multimodal_model(
    family: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm = tiny_checkpoint(family)
    decoder = AutoModelForCausalLM.from_config(open_source(llm).decoder.config)
    proxy = lora.attach(keep_blocks(decoder, KEEP), r=4, alpha=6, dropout=0.0, seed=0)
    generator = torch.Generator().manual_seed(5)
    state = lora.adapter_state(proxy)
    state = {k: t if "lora_A" in k else 0.1 * torch.randn(t.shape, generator=generator) for k, t in state.items()}
    manifest = Manifest("proxy-adapter", model_identity(llm), 6, KEEP)
    write_adapter(tmp_path / "adapter", lora.adapter_config(proxy), state, manifest)
    tuned = fuse(llm, tmp_path / "adapter", tmp_path / "a", scale=0.7)
    fused = fuse(llm, tmp_path / "adapter", tmp_path / "c", form="checkpoint", scale=0.7)

    on_llm = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(llm), tuned)
    assert {name for name, _ in on_llm.named_parameters() if "lora_A" in name} == {
        name.replace(".lora_A.weight", ".lora_A.default.weight") for name in read_adapter(tuned)[1] if "_A" in name
    }
    ours = lora.load_with_adapter(llm, tuned)
    with torch.no_grad():
        unmerged = on_llm(input_ids=IDS, use_cache=False).logits
        assert torch.equal(unmerged, ours(input_ids=IDS, use_cache=False).logits)
        merged, checkpoint = on_llm.merge_and_unload(), AutoModelForImageTextToText.from_pretrained(fused)
        assert torch.allclose(checkpoint(input_ids=IDS, use_cache=False).logits, unmerged, atol=1e-4)
    found, expected = checkpoint.state_dict(), merged.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    before = AutoModelForImageTextToText.from_pretrained(llm).state_dict()
    assert sum(not torch.equal(before[name], found[name]) for name in found) == len(state) // 2


def test_an_adapter_on_other_modules_in_each_block(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    config, tensors, manifest = read_adapter(adapter)
    few = {n: t for n, t in tensors.items() if ("layers.0." in n) == ("q_proj" in n)}
    names = sorted({n.split("model.model.")[1].split(".lora_")[0] for n in few})
    config.update(target_modules=[f"model.{name}" for name in names], layers_to_transform=None, layers_pattern=None)
    write_adapter(adapter, config, few, manifest)
    tuned = fuse(llm, adapter, tmp_path / "a")
    fused = fuse(llm, adapter, tmp_path / "c", form="checkpoint")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llm), tuned).merge_and_unload()
    found, expected = load_file(fused / "model.safetensors"), merged.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_re_keying_reads_no_weight(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    monkeypatch.setattr(Stored, "read", lambda stored: pytest.fail("a weight was read"))
    fuse(llm, adapter, tmp_path / "a")


def test_progress_ends_at_one(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    told: list[float] = []
    fuse(llm, adapter, tmp_path / "c", form="checkpoint", on_progress=lambda fraction, text: told.append(fraction))
    assert told == sorted(told)
    assert len(told) > 2
    assert told[-1] == 1.0


def test_a_full_disk_leaves_nothing(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="GB are needed"):
        fuse(llm, adapter, tmp_path / "c", form="checkpoint")
    assert {item.name for item in tmp_path.iterdir()} == {"adapter"}


def test_only_the_trained_blocks_are_touched(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, adapter = make_adapter(tiny_checkpoint(), tmp_path / "adapter", layers=[0, 2])
    config, tensors, _ = read_adapter(fuse(tiny_checkpoint(), adapter, tmp_path / "a"))
    assert config["layers_to_transform"] == [1, 5]
    assert {int(name.split("layers.")[1].split(".")[0]) for name in tensors} == {1, 5}


def test_what_is_written_down(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "of-proxy")
    for form, kind in (("adapter", "llm-adapter"), ("checkpoint", "fused")):
        out = fuse(str(llm), str(adapter), str(tmp_path / form), form=form, scale=0.5)
        manifest = Manifest.read(out)
        assert (manifest.kind, manifest.llm_sha256, manifest.layer_map) == (kind, model_identity(llm), KEEP)
        assert (manifest.settings["scale"], manifest.settings["rounds"], manifest.seed) == (0.5, 3, 9)
        again = fuse(llm, adapter, tmp_path / f"{form}-again", form=form, scale=0.5)
        assert all(file.read_bytes() == (again / file.name).read_bytes() for file in out.iterdir())
    fused = tmp_path / "checkpoint"
    assert AutoTokenizer.from_pretrained(fused)("some text") == AutoTokenizer.from_pretrained(llm)("some text")
    assert (fused / "generation_config.json").is_file()


def refused(error: type[FedproxyError], message: str, llm: Path, adapter: Path, out: Path, **options: Any) -> None:
    for form in ("adapter", "checkpoint"):
        with pytest.raises(error, match=message):
            fuse(llm, adapter, out, **{"form": form, **options})
        assert not out.exists()


def test_another_llm_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, adapter = make_adapter(tiny_checkpoint(), tmp_path / "adapter")
    others = [tiny_checkpoint("mistral"), tiny_checkpoint(num_hidden_layers=7), tiny_checkpoint(rms_norm_eps=1e-3)]
    others.append(tiny_checkpoint(seed=1))  # the same shape, other weights
    for other in others:
        refused(ArtifactError, "another LLM", other, adapter, tmp_path / "out")
    refused(ArtifactError, "no checkpoint", tmp_path / "absent", adapter, tmp_path / "out")


def test_an_adapter_that_is_fused_already_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    tuned = fuse(llm, adapter, tmp_path / "a")
    refused(ArtifactError, "fused", llm, tuned, tmp_path / "out")
    fused = fuse(llm, adapter, tmp_path / "c", form="checkpoint")
    refused(ArtifactError, "holds this adapter already", fused, adapter, tmp_path / "out")
    refused(ArtifactError, "not an adapter", llm, fused, tmp_path / "out")


def test_an_exchanged_manifest_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    good = Manifest.read(adapter)
    for change in ({"layer_map": [0, 2, 5]}, {"kind": "llm-adapter"}, {"llm_blocks": 7}, {"llm_sha256": "f" * 64}):
        replace(good, **change).write(adapter)
        refused(ArtifactError, "do not belong together", llm, adapter, tmp_path / "out")


def test_a_consistent_lie_about_the_map_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    config, tensors, manifest = read_adapter(adapter)
    lies: list[tuple[dict[str, Any], str]] = [
        ({"layer_map": [1, 2]}, "has none"),
        ({"layer_map": [1, 2, 8], "llm_blocks": 9}, "has 6 blocks"),
        ({"kind": "llm-adapter"}, "has none"),
    ]
    for number, (change, message) in enumerate(lies):
        write_adapter(tmp_path / str(number), config, tensors, replace(manifest, **change))
        refused(ArtifactError, message, llm, tmp_path / str(number), tmp_path / "out")


def test_tensors_of_another_architecture_are_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    config, tensors, manifest = read_adapter(adapter)
    changes: list[tuple[Callable[[str, torch.Tensor], tuple[str, torch.Tensor]], str]] = [
        (lambda name, t: (name.replace("model.layers", "transformer.h"), t), "not under 'model.layers'"),
        (lambda name, t: (name.replace("up_proj", "side_proj"), t), "no linear layer"),
        (lambda name, t: (name, torch.cat([t, t], int("lora_A" in name))), "its layer has"),
        (lambda name, t: (name, t * float("nan")), "NaN or infinity"),
    ]
    for number, (change, message) in enumerate(changes):
        altered = dict(change(name, tensor) for name, tensor in tensors.items())
        write_adapter(tmp_path / str(number), config, altered, manifest)
        refused(ArtifactError, message, llm, tmp_path / str(number), tmp_path / "out")


def test_a_sum_that_overflows_leaves_nothing_behind(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint(dtype=torch.float16)
    _, adapter = make_adapter(llm, tmp_path / "adapter", size=1e6)
    refused(ArtifactError, "overflows", llm, adapter, tmp_path / "out", form="checkpoint")


def test_a_wrong_fan_in_fan_out_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, adapter = make_adapter(tiny_checkpoint("gpt2"), tmp_path / "adapter", fan_in_fan_out=False)
    assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    refused(ArtifactError, "fan_in_fan_out", tiny_checkpoint("gpt2"), adapter, tmp_path / "out")


def test_wrong_usage(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    refused(UsageError, "unknown form", llm, adapter, tmp_path / "out", form="zip")
    refused(UsageError, "scale", llm, adapter, tmp_path / "out", scale=float("nan"))
    refused(UsageError, "or auto, got best", llm, adapter, tmp_path / "out", scale="best")
    refused(UsageError, "--public FILE", llm, adapter, tmp_path / "out", scale="auto")
    refused(UsageError, "only for scale = auto", llm, adapter, tmp_path / "out", public=llm / "config.json")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="overwrite"):
        fuse(llm, adapter, tmp_path / "taken")
    fuse(llm, adapter, tmp_path / "taken", overwrite=True)
    fuse(llm, adapter, tmp_path / "taken", overwrite=True)


def test_a_path_that_holds_no_adapter_is_told_apart(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    make_adapter(tiny_checkpoint(), tmp_path / "run" / "adapter")
    (tmp_path / "empty").mkdir()
    for name, says in (
        ("run", r"no fedproxy.json. It is a run: give .*run/adapter"),
        ("run/adaptor", r"no such directory. Check the path"),
        ("empty", r"no fedproxy.json. Check the path"),
    ):
        refused(ArtifactError, says, tiny_checkpoint(), tmp_path / name, tmp_path / "out")


def test_nothing_that_is_read_or_foreign_is_replaced(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "parent" / "llm"))
    for name in ("parent", "parent/llm", "text"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "fedproxy.json").write_text("{}")
    public = tmp_path / "text" / "public.txt"
    public.write_text("text")
    _, adapter = make_adapter(llm, tmp_path / "adapter")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("dear")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for out in (llm, adapter, tmp_path / "parent", llm / "tuned", tmp_path / "text"):
        with pytest.raises(UsageError, match="which is read"):
            fuse(llm, adapter, out, overwrite=True, scale="auto", public=public)
    with pytest.raises(UsageError, match="not made by fedproxy"):
        fuse(llm, adapter, tmp_path / "mine", overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
