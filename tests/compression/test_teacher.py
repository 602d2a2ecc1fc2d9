import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedproxy.checkpoint_files import open_checkpoint
from fedproxy.compression import teacher
from fedproxy.compression.heal_loss import top_tokens
from fedproxy.compression.heal_student import leaving
from fedproxy.compression.teacher import Teacher, ask_teacher, perplexity_of
from fedproxy.config import Heal
from fedproxy.errors import ArtifactError, ResourceError, UsageError
from fedproxy.models.block_stream import BlockStream
from fedproxy.models.checkpoints import load_tokenizer
from fedproxy.models.families import blocks
from fedproxy.models.placement import computed_in
from fedproxy.models.source import open_source
from fedproxy.models.text_batches import batches
from tests.conftest import make_model

Checkpoint = Callable[..., Path]
KEEP = [1, 2, 4]
DOCUMENTS = [f"Document {i} says that {'very ' * i}little happens." for i in range(7)]
SETTINGS = Heal(steps=1, top_k=9)
CPU = torch.device("cpu")


def ask(llm: Path, work: Path, settings: Heal = SETTINGS, *, documents: Any = DOCUMENTS, **changes: Any) -> Teacher:
    tokenizer = load_tokenizer(llm)
    texts, held_out = (batches(tokenizer, part, max_length=48, batch_size=3) for part in (documents[2:], documents[:2]))
    work.mkdir(exist_ok=True)
    arguments: dict[str, Any] = {"placement": "stream", "progress": lambda done, text: None, **changes}
    return ask_teacher(work, open_source(llm), KEEP, texts, held_out, settings, **arguments)


def ordinary(model: Any, ids: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of a text, and the hidden states that enter blocks 2 and 4 and leave the last."""
    with torch.no_grad(), leaving(blocks(model), (1, 3, 5)) as found:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits, [states[0] for states in found]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt", "bloom"])
def test_it_is_what_the_ordinary_forward_pass_says(family: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint(family)
    said = ask(llm, tmp_path / "work")
    rows = sorted((load_tokenizer(llm)(text)["input_ids"][:48] for text in DOCUMENTS[2:]), key=len)
    chosen = [3, 0]
    targets = said.targets(chosen, CPU)
    logits, hidden = zip(*(ordinary(make_model(family), rows[i]) for i in chosen), strict=True)
    expected = top_tokens(torch.cat(logits), 9, SETTINGS.temperature)
    assert torch.equal(targets.tokens.index, expected.index)
    assert torch.allclose(targets.tokens.log_p, expected.log_p, atol=1e-4)
    assert torch.allclose(targets.tokens.rest, expected.rest, atol=1e-4)
    assert len(targets.hidden) == 3
    for place, found in enumerate(targets.hidden):
        assert torch.allclose(found, torch.cat([states[place] for states in hidden]), atol=1e-4)


def test_it_does_not_matter_where_the_llm_is_run(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint(dtype=torch.bfloat16)
    found = [ask(llm, tmp_path / place, placement=place) for place in ("memory", "stream")]
    assert found[0].perplexity == found[1].perplexity
    files = [(tmp_path / place / "teacher.safetensors").read_bytes() for place in ("memory", "stream")]
    assert files[0] == files[1]
    assert found[0].targets([0], CPU).hidden[0].dtype == (computed_in(CPU, torch.bfloat16) or torch.bfloat16)


def test_the_perplexity_is_the_held_out_documents(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    held_out = batches(load_tokenizer(llm), DOCUMENTS[:2], max_length=48, batch_size=3)
    assert perplexity_of(BlockStream(make_model()), held_out) == pytest.approx(ask(llm, tmp_path / "w").perplexity)
    with pytest.raises(ArtifactError, match="shorter than two tokens"):
        ask(llm, tmp_path / "w2", documents=["a", "b", "cd"])


def test_the_llm_runs_once(tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_checkpoint()
    first = ask(llm, tmp_path / "work")
    monkeypatch.setattr(teacher, "open_stream", lambda *_: pytest.fail("the LLM ran again"))
    assert ask(llm, tmp_path / "work") == first


def test_what_is_not_complete_is_done_again(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    first = ask(llm, tmp_path / "work")
    (tmp_path / "work" / "teacher.json").unlink()
    (tmp_path / "work" / "teacher.safetensors").write_bytes(b"half")
    assert ask(llm, tmp_path / "work") == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": Heal(steps=1, top_k=8)}, "top_k was 9, is 8"),
        ({"settings": Heal(steps=1, top_k=9, temperature=1.0)}, "temperature was 2.0, is 1.0"),
        ({"settings": Heal(steps=1, top_k=9, hidden_weight=0.0)}, r"boundaries was \[2, 4, 6\], is \[\]"),
        ({"documents": [*DOCUMENTS[:-1], "Another."]}, "text was"),
    ],
)
def test_what_was_said_otherwise_is_not_used(
    changes: dict[str, Any], message: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    ask(tiny_checkpoint(), tmp_path / "work")
    with pytest.raises(UsageError, match=message):
        ask(tiny_checkpoint(), tmp_path / "work", **changes)
    ask(tiny_checkpoint(), tmp_path / "work", Heal(steps=900, top_k=9, learning_rate=1.0))


def test_another_llm_is_noticed(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    ask(tiny_checkpoint(), tmp_path / "work")
    with pytest.raises(UsageError, match="llm was"):
        ask(tiny_checkpoint(seed=1), tmp_path / "work")


def test_a_file_of_other_size_is_noticed(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    ask(tiny_checkpoint(), tmp_path / "work")
    ask(tiny_checkpoint(), tmp_path / "other", documents=DOCUMENTS[:-1])
    shutil.copy(tmp_path / "other" / "teacher.safetensors", tmp_path / "work")
    with pytest.raises(ArtifactError, match="does not fit"):
        ask(tiny_checkpoint(), tmp_path / "work")


def test_without_hidden_states_the_file_is_small(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    said = ask(tiny_checkpoint(), tmp_path / "work", Heal(steps=1, hidden_weight=0.0, top_k=1000))
    assert sorted(said.tensors) == ["index", "log_p", "rest"]
    assert said.targets([0], CPU).hidden == []
    assert said.tensors["log_p"].shape[1] == open_checkpoint(tiny_checkpoint()).config["vocab_size"]


def test_a_disk_too_small_is_said_first(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 0))
    with pytest.raises(ResourceError, match="hidden_weight"):
        ask(tiny_checkpoint(), tmp_path / "work")
    with pytest.raises(ResourceError, match="top_k"):
        ask(tiny_checkpoint(), tmp_path / "work", Heal(steps=1, hidden_weight=0.0))
    assert list((tmp_path / "work").iterdir()) == []
