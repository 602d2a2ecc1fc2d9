"""Adapters that plain PEFT trained on a proxy: nothing of fedproxy's in their folder."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import model_identity
from fedproxy.cli import main
from fedproxy.errors import ArtifactError
from fedproxy.fusion import fuse
from fedproxy.models.checkpoints import save_checkpoint
from fedproxy.models.families import keep_blocks
from fedproxy.models.lora import load_with_adapter, read_any_adapter
from tests.fusion.test_fuse import KEEP, logits
from tests.fusion.test_trained_weights import IDS, healed_proxy

Checkpoint = Callable[..., Path]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": r".*\.(q|v)_proj", "use_rslora": True},
    {"target_modules": ["k_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers", "bias": "all"},
    {"target_modules": ["v_proj"], "exclude_modules": ["model.layers.1.self_attn.v_proj"], "modules_to_save": ["norm"]},
]


def make_proxy(llm: Path, out: Path) -> Path:
    save_checkpoint(out, keep_blocks(AutoModelForCausalLM.from_pretrained(llm), KEEP), llm)
    Manifest("proxy", model_identity(llm), 6, KEEP).write(out)
    return out


def train(proxy: Path, out: Path, config: Any = None, **options: Any) -> PeftModel:
    """Two steps of plain PEFT on the proxy; what it saves lies in `out`."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **options}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(proxy)
        model = get_peft_model(base, config or LoraConfig(task_type="CAUSAL_LM", **options)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(2):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(out)
    return model.eval()


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """An LLM, its proxy and an adapter by PEFT."""
    folder = tmp_path_factory.mktemp("trained")
    llm = tiny_checkpoint("qwen2")
    proxy = make_proxy(llm, folder / "proxy")
    train(proxy, folder / "adapter")
    return llm, proxy, folder / "adapter"


@pytest.mark.parametrize("options", PLAIN, ids=lambda options: str(options["target_modules"]))
@pytest.mark.parametrize("healed", [False, True], ids=["unhealed", "healed"])
def test_each_kept_block_of_the_fused_llm_gains_what_its_proxy_block_gained(
    healed: bool, options: dict[str, Any], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The oracle by hand: PEFT merges on the proxy, and weight by weight the difference is added to the LLM."""
    llm = tiny_checkpoint("qwen2")
    proxy = (healed_proxy if healed else make_proxy)(llm, tmp_path / "proxy")
    model = train(proxy, tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter" / "fedproxy.json").exists()
    before, untuned = (load_file(folder / "model.safetensors") for folder in (llm, proxy))
    merged = fuse(llm, tmp_path / "adapter", tmp_path / "c", form="checkpoint", proxy=proxy)
    on_llm = fuse(llm, tmp_path / "adapter", tmp_path / "a", proxy=proxy)

    proxys_own = load_with_adapter(proxy, tmp_path / "adapter")
    assert torch.allclose(logits(proxys_own), logits(model), atol=1e-5)
    tuned = model.merge_and_unload().state_dict()
    expected = dict(before)
    for name, weight in untuned.items():
        head, word, rest = name.partition(".layers.")
        place = f"{head}{word}{KEEP[int(rest[0])]}{rest[1:]}" if word else name
        expected[place] = before[place] + (tuned[name] - weight)
    found = load_file(merged / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in found)
    assert any(not found[name].equal(before[name]) for name in found)
    restored = keep_blocks(AutoModelForCausalLM.from_pretrained(merged), KEEP)
    assert torch.allclose(logits(restored), logits(model), atol=1e-4) is not healed
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llm), on_llm).merge_and_unload()
    assert all(tensor.equal(found[name]) for name, tensor in by_peft.state_dict().items() if name in found)


def test_of_what_peft_writes_its_defaults_are_not_written_again(
    trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """PEFT before 0.14 refuses keys that it does not know, and a newer one writes them all."""
    llm, proxy, adapter = trained
    fuse(llm, adapter, tmp_path / "tuned", proxy=proxy)
    given, written = (json.loads((folder / CONFIG).read_text()) for folder in (adapter, tmp_path / "tuned"))
    assert {"use_dora", "rank_pattern"} <= given.keys() - written.keys()
    assert {"peft_type", "r", "lora_alpha", "target_modules"} <= written.keys()


def test_the_command_takes_the_proxy_and_the_card_tells_no_federation(
    trained: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm, proxy, adapter = trained

    def command(*options: object) -> object:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in ("fuse", llm, adapter, tmp_path / "tuned", "--json", *options)])
        return end.value.code

    assert command() == 3
    assert "--proxy" in capsys.readouterr().err
    assert command("--proxy", proxy) == 0
    assert json.loads(capsys.readouterr().out)["form"] == "adapter"
    manifest = Manifest.read(tmp_path / "tuned")
    assert (manifest.kind, manifest.layer_map) == ("llm-adapter", KEEP)
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "client" not in card
    assert "federated" not in card


def test_in_memory_it_is_the_same_model(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    llm, proxy, adapter = trained
    written = fuse(llm, adapter, tmp_path / "a", proxy=proxy)
    model = fuse(AutoModelForCausalLM.from_pretrained(llm), adapter, proxy=proxy)
    assert torch.equal(logits(model), logits(load_with_adapter(llm, written)))


def test_an_adapter_in_half_precision_is_plugged_in(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    llm, proxy, adapter = trained
    half = {name: tensor.half() for name, tensor in load_file(adapter / WEIGHTS).items()}
    foreign = changed(adapter, tmp_path / "half", tensors=half)
    found = load_file(fuse(llm, foreign, tmp_path / "a", proxy=proxy) / WEIGHTS)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def changed(adapter: Path, out: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A copy of an adapter with other tensors or another configuration."""
    out.mkdir()
    held = json.loads((adapter / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps({**held, **config}))
    save_file(load_file(adapter / WEIGHTS) if tensors is None else tensors, out / WEIGHTS)
    return out


def refused(says: str, llm: Path, adapter: Path, proxy: Path) -> None:
    out = adapter.parent / "out"
    with pytest.raises(ArtifactError, match=says):
        fuse(llm, adapter, out, proxy=proxy)
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
        {"trainable_token_indices": [1, 2]},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"target_parameters": ["mlp.up_proj.weight"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_cannot_be_moved_exactly_is_refused_by_name(
    options: dict[str, Any], trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    llm, proxy, adapter = trained
    refused(next(iter(options)), llm, changed(adapter, tmp_path / "changed", **options), proxy)


def test_other_methods_of_peft_and_settings_of_later_releases_are_refused_by_name(
    trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    llm, proxy, adapter = trained
    train(proxy, tmp_path / "vera", VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    refused("VERA", llm, tmp_path / "vera", proxy)
    refused("use_twist", llm, changed(adapter, tmp_path / "later", use_twist=True), proxy)
    assert read_any_adapter(changed(adapter, tmp_path / "unused", use_twist=False), proxy)


def test_an_adapter_that_was_trained_on_something_else_is_refused(
    trained: tuple[Path, Path, Path], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm, proxy, adapter = trained
    train(llm, tmp_path / "on_llm")
    refused("on_llm was trained on", llm, tmp_path / "on_llm", proxy)
    refused("of block 3", llm, changed(tmp_path / "on_llm", tmp_path / "moved", base_model_name_or_path="gone"), proxy)
    refused("is no proxy", llm, adapter, llm)
    refused("another LLM", tiny_checkpoint("qwen2", seed=1), adapter, proxy)
    refused("healed", llm, adapter, healed_proxy(llm, tmp_path / "healed"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, first: {**t, first: t[first] * float("nan")}, "NaN"),
        (lambda t, first: {**t, first: t[first][:2].clone()}, "rank 4"),
        (lambda t, first: {**t, first: t[first][:, :8].clone()}, "its layer has 32 inputs"),
        (lambda t, first: {name: v for name, v in t.items() if name != first}, "no counterpart"),
        (lambda t, first: {n.replace("layers.1.", "layers.3."): v for n, v in t.items()}, "of block 3"),
        (lambda t, first: {n.replace("q_proj", "o_proj"): v for n, v in t.items()}, "target_modules"),
        (lambda t, first: {n.replace("model.model.model", "model.model"): v for n, v in t.items()}, "is not under"),
        (lambda t, first: {}, "no tensors"),
    ],
    ids=["not finite", "rank", "shape", "half a pair", "block", "target", "path", "empty"],
)
def test_tensors_that_do_not_fit_the_proxy_are_refused(
    change: Callable[..., Any], says: str, trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    llm, proxy, adapter = trained
    tensors = load_file(adapter / WEIGHTS)
    refused(says, llm, changed(adapter, tmp_path / "bad", change(tensors, sorted(tensors)[0])), proxy)
