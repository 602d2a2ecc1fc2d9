import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedproxy.adapter_files import write_adapter
from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import model_identity, open_checkpoint
from fedproxy.compression.heal import discard, heal, split_documents, thinned
from fedproxy.compression.heal_training import Loss, rate
from fedproxy.compression.prune import prune
from fedproxy.compression.teacher import perplexity_of
from fedproxy.config import Heal
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.fusion import fuse
from fedproxy.models import lora
from fedproxy.models.block_stream import BlockStream
from fedproxy.models.checkpoints import load_model, load_tokenizer
from fedproxy.models.placement import open_stream
from fedproxy.models.source import open_source
from fedproxy.models.text_batches import batches
from tests.conftest import FAMILIES, MULTIMODAL

Checkpoint = Callable[..., Path]
KEEP = [1, 2, 4]
DOCUMENTS = [f"Document {i} says that {'very ' * (i % 5)}little happens." for i in range(12)]
SETTINGS: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "max_length": 48,
    "lora_r": 4,
    "held_out": 2,
    "save_every": 2,
    "learning_rate": 3e-3,
}


def healed(llm: Path, out: Path, *, documents: list[str] = DOCUMENTS, **changes: Any) -> dict[str, Any]:
    """Prune `llm` to `out` and heal it there, in the work directory `out`.heal."""
    arguments = {"trained": range(len(KEEP)), "seed": 0, "placement": "stream", "progress": lambda done, text: None}
    arguments |= {name: changes.pop(name) for name in list(changes) if name in arguments}
    source = open_source(llm)
    out.mkdir(exist_ok=True, parents=True)
    for file in out.iterdir():
        file.unlink()
    prune(source, KEEP, out)
    return heal(
        source,
        KEEP,
        out,
        settings=Heal(**{**SETTINGS, **changes}),
        documents=documents,
        tokenizer=load_tokenizer(llm),
        work=out.with_name(f"{out.name}.heal"),
        **arguments,
    )


def weights(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.glob("*.safetensors*"))}


@pytest.mark.parametrize(
    ("mode", "dtype"), [("full", torch.bfloat16), ("lora", torch.float32), ("lora", torch.bfloat16)]
)
def test_the_proxy_learns_and_only_its_blocks_change(
    mode: str, dtype: torch.dtype, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm = tiny_checkpoint(dtype=dtype)
    (tmp_path / "pruned").mkdir()
    prune(open_source(llm), KEEP, tmp_path / "pruned")
    record = healed(llm, tmp_path / "proxy", mode=mode, steps=20)
    first, last = record["losses"][0], record["losses"][-1]
    assert last["divergence"] < 0.8 * first["divergence"]
    assert last["hidden"] < first["hidden"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "proxy"))
    assert before.keys() == after.keys()
    assert {t.dtype for t in after.values()} == {dtype}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name in before if ".layers." in name and name.endswith("_proj.weight")}
    assert changed >= linear
    assert all(name in linear if mode == "lora" else ".layers." in name for name in changed)
    others = [file.name for file in (tmp_path / "pruned").iterdir() if file.suffix != ".safetensors"]
    assert sorted(file.name for file in (tmp_path / "proxy").iterdir()) == sorted([*others, "model.safetensors"])
    for name in others:
        assert (tmp_path / "proxy" / name).read_bytes() == (tmp_path / "pruned" / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "proxy")


@pytest.mark.parametrize(
    ("family", "mode"),
    [(family, "lora") for family in sorted(FAMILIES | MULTIMODAL)]
    + [(family, "full") for family in ("gpt2", "mixtral", "llava")],
)
def test_every_family_can_be_healed(family: str, mode: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    record = healed(tiny_checkpoint(family), tmp_path / "proxy", mode=mode, steps=2)
    assert record["losses"][1]["hidden"] > 0
    assert load_model(tmp_path / "proxy").config.num_hidden_layers == 3


def test_what_is_recorded(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    told: list[float] = []
    record = healed(tiny_checkpoint(), tmp_path / "proxy", steps=7, progress=lambda done, text: told.append(done))
    assert json.loads(json.dumps(record)) == record
    assert record["settings"]["temperature"] == 2.0
    assert (record["documents"], record["held_out"]) == (10, 2)
    assert [point["step"] for point in record["losses"]] == list(range(1, 8))
    assert set(record["perplexity"]) == {"llm", "before", "after"}
    assert record["perplexity"]["before"] != record["perplexity"]["after"]
    assert record["seconds"] > 0
    assert told == sorted(told)
    assert told[-1] == 1.0
    discard(tmp_path / "proxy.heal")
    assert not (tmp_path / "proxy.heal").exists()
    discard(tmp_path / "proxy.heal")


def test_a_long_curve_is_thinned_to_means() -> None:
    points = thinned([Loss(step, 0.5) for step in range(1, 252)])
    assert len(points) == 84
    assert points[0] == {"step": 3, "divergence": 2.0, "hidden": 0.5}
    assert points[-1] == {"step": 251, "divergence": 250.5, "hidden": 0.5}


def test_without_hidden_states_only_predictions_are_learned(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    record = healed(tiny_checkpoint(), tmp_path / "proxy", steps=20, hidden_weight=0.0)
    assert record["losses"][-1]["divergence"] < 0.8 * record["losses"][0]["divergence"]
    assert {point["hidden"] for point in record["losses"]} == {0.0}


class StopError(Exception):
    """Stands in for a kill."""


@pytest.mark.parametrize(("mode", "dtype"), [("lora", torch.bfloat16), ("full", torch.float32)])
def test_stopped_after_any_step_it_ends_in_the_same_bits(
    mode: str, dtype: torch.dtype, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llm = tiny_checkpoint(dtype=dtype)
    whole = healed(llm, tmp_path / "whole", mode=mode)
    moments = ["asking the LLM", "healing, step 1 ", "healing, step 5 ", "proxy healed"]
    for moment in moments:

        def stop(done: float, text: str, moment: str = moment) -> None:
            if text.startswith(moment):
                raise StopError

        with pytest.raises(StopError):
            healed(llm, tmp_path / "stopped", mode=mode, progress=stop)
    record = healed(llm, tmp_path / "stopped", mode=mode)
    assert {**record, "seconds": 0} == {**whole, "seconds": 0}
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_the_seed_decides(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        healed(tiny_checkpoint(), tmp_path / name, seed=seed, steps=2)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_how_often_it_is_saved_changes_nothing(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    healed(tiny_checkpoint(), tmp_path / "a", save_every=1, steps=3)
    healed(tiny_checkpoint(), tmp_path / "b", save_every=100, steps=3)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    healed(tiny_checkpoint(), tmp_path / "a", save_every=5, steps=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate was 0.003, is 0.001"),
        ({"steps": 9}, "steps was 6, is 9|text was"),
        ({"mode": "full"}, "mode was lora, is full"),
        ({"seed": 5}, "text was"),
        ({"max_length": 20}, "text was"),
    ],
)
def test_unfinished_work_with_other_settings_is_not_used(
    changes: dict[str, Any], message: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    healed(tiny_checkpoint(), tmp_path / "proxy")
    held = weights(tmp_path / "proxy.heal")
    with pytest.raises(UsageError, match=message):
        healed(tiny_checkpoint(), tmp_path / "proxy", **changes)
    assert weights(tmp_path / "proxy.heal") == held


def test_another_proxy_is_noticed(tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healed(tiny_checkpoint(), tmp_path / "proxy")
    monkeypatch.setitem(globals(), "KEEP", [0, 2, 4])
    with pytest.raises(UsageError, match="proxy was"):
        healed(tiny_checkpoint(), tmp_path / "proxy")


def test_a_directory_of_something_else_is_left_alone(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "proxy.heal").mkdir()
    (tmp_path / "proxy.heal" / "thesis.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        healed(tiny_checkpoint(), tmp_path / "proxy")
    assert (tmp_path / "proxy.heal" / "thesis.txt").read_text() == "dear"


def test_a_damaged_state_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    healed(tiny_checkpoint(), tmp_path / "proxy")
    state = tmp_path / "proxy.heal" / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-5])
    with pytest.raises(ArtifactError):
        healed(tiny_checkpoint(), tmp_path / "proxy")
    save_file({"losses": torch.zeros(1, 2)}, state)
    with pytest.raises(ArtifactError, match="damaged"):
        healed(tiny_checkpoint(), tmp_path / "proxy")


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_loss_that_is_no_number_is_one_clear_error(mode: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(nan|inf).*learning_rate.*1e\+30"):
        healed(tiny_checkpoint(), tmp_path / "proxy", mode=mode, learning_rate=1e30)
    healed(tiny_checkpoint(), tmp_path / "proxy", mode=mode)


def test_impossible_settings_and_texts(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    for changes, message in (
        ({"steps": 0}, "steps ≥ 1"),
        ({"temperature": 0.0}, "temperature = 0.0: must be greater than 0"),
        ({"learning_rate": math.nan}, "learning_rate = nan"),
        ({"mode": "half"}, "mode = 'half'"),
    ):
        with pytest.raises(UsageError, match=message):
            healed(tiny_checkpoint(), tmp_path / "proxy", **changes)
    with pytest.raises(ArtifactError, match="two different public documents"):
        healed(tiny_checkpoint(), tmp_path / "proxy", documents=["the same", "the same"])
    with pytest.raises(ArtifactError, match=r"\b200\b"):
        healed(
            tiny_checkpoint(vocab_size=200, pad_token_id=0, bos_token_id=1, eos_token_id=2),
            tmp_path / "proxy",
            documents=DOCUMENTS,
        )


def test_what_is_held_out_is_not_trained_on() -> None:
    documents = [str(i % 40) for i in range(100)]
    learned, held_out = split_documents(documents, Heal(held_out=64), 0, wanted=792)
    assert (len(learned), len(held_out)) == (30, 10)
    assert sorted([*learned, *held_out]) == sorted(set(documents))
    learned, held_out = split_documents(documents, Heal(held_out=3), 0, wanted=16)
    assert (len(learned), len(held_out)) == (16, 3)
    assert split_documents(documents, Heal(), 1, wanted=16) != split_documents(documents, Heal(), 0, wanted=16)


def test_the_rate_goes_up_and_down() -> None:
    assert [rate(step, 10) for step in range(10)] == pytest.approx([1, 1, *(i / 9 for i in range(8, 0, -1))])
    assert [rate(step, 20) for step in (0, 1, 2, 19)] == pytest.approx([0.5, 1, 1, 1 / 18])
    assert [rate(step, 1) for step in range(1)] == [1.0]


def test_several_shards_become_a_whole_checkpoint(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    load_model(tiny_checkpoint()).save_pretrained(llm, max_shard_size="60kB")
    load_tokenizer(tiny_checkpoint()).save_pretrained(llm)
    whole = healed(tiny_checkpoint(), tmp_path / "one")
    for mode in ("lora", "full"):
        record = healed(llm, tmp_path / mode, mode=mode)
        assert record["perplexity"]["llm"] == whole["perplexity"]["llm"]
        assert len(open_checkpoint(tmp_path / mode).tensors) == len(open_checkpoint(tmp_path / "one").tensors)
        expected = set(weights(tmp_path / mode))
        assert ("model.safetensors" in expected) != ("model.safetensors.index.json" in expected)
        load_model(tmp_path / mode)


def test_the_llm_is_let_go(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint(tie_word_embeddings=True)
    source = open_source(llm)
    BlockStream(source.decoder, source, resident=True)
    (tmp_path / "proxy").mkdir()
    prune(source, KEEP, tmp_path / "proxy")
    heal(
        source,
        KEEP,
        tmp_path / "proxy",
        trained=range(len(KEEP)),
        settings=Heal(**SETTINGS),
        documents=DOCUMENTS,
        tokenizer=load_tokenizer(llm),
        work=tmp_path / "work",
        seed=0,
        placement="memory",
        progress=lambda done, text: None,
    )
    assert all(parameter.is_meta for parameter in source.decoder.parameters())
    held_out = batches(load_tokenizer(llm), DOCUMENTS, max_length=48, batch_size=4)
    again = perplexity_of(open_stream(source, "stream"), held_out)
    assert again == perplexity_of(open_stream(open_source(llm), "memory"), held_out)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_what_healing_changed_never_reaches_the_llm(mode: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    healed(llm, tmp_path / "proxy", mode=mode, steps=20)
    proxy = lora.attach(load_model(tmp_path / "proxy"), r=4, alpha=6, dropout=0.0, seed=0)
    generator = torch.Generator().manual_seed(5)
    state = {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in lora.adapter_state(proxy).items()}
    manifest = Manifest("proxy-adapter", model_identity(llm), 6, KEEP, settings={"healed": True})
    write_adapter(tmp_path / "adapter", lora.adapter_config(proxy), state, manifest)
    fuse(llm, tmp_path / "adapter", tmp_path / "fused", form="checkpoint")
    before, after = (load_file(path / "model.safetensors") for path in (llm, tmp_path / "fused"))
    seen = 0
    for name, weight in before.items():
        parts = name.split(".")
        block = int(parts[2]) if parts[1] == "layers" else None
        pair = f"base_model.model.model.layers.{KEEP.index(block)}." if block in KEEP else "none"
        a = state.get(f"{pair}{'.'.join(parts[3:-1])}.lora_A.weight")
        if a is not None:
            b = state[f"{pair}{'.'.join(parts[3:-1])}.lora_B.weight"]
            weight, seen = weight + 1.5 * (b @ a), seen + 1
        assert torch.equal(after[name], weight)
    assert seen == 7 * len(KEEP)
