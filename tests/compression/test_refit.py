from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedproxy.artifacts import Manifest
from fedproxy.compression.compress import compress
from fedproxy.compression.heal import split_documents
from fedproxy.compression.heal_student import leaving
from fedproxy.compression.prune import prune
from fedproxy.compression.refit import RIDGE, Fit, gaps, refit
from fedproxy.config import Heal
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models.checkpoints import load_tokenizer
from fedproxy.models.source import open_source
from tests.conftest import FAMILIES

Checkpoint = Callable[..., Path]
KEEP = [0, 2, 3]
DOCUMENTS = [f"Document {i} says that {'very ' * (i % 7)}little of {i * 37} happens." for i in range(60)]
HEAL = Heal(refit=40, batch_size=8, max_length=48, held_out=8)
NOT_JUST_ADDED = {"gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe"}
"""Families that norm what leaves a block's last linear layer, or choose among experts."""


def refitted(llm: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Prune `llm` to `out` and refit it there."""
    source = open_source(llm)
    out.mkdir()
    prune(source, KEEP, out)
    arguments = {"trained": range(len(KEEP)), "settings": HEAL, "placement": "memory", **changes}
    tokenizer = load_tokenizer(llm)
    return refit(
        source, KEEP, out, documents=DOCUMENTS, tokenizer=tokenizer, seed=0, progress=lambda done: None, **arguments
    )


def test_a_gap_ends_where_the_next_kept_block_begins() -> None:
    assert gaps([0, 1, 2, 3], 4) == {}
    assert gaps([0, 1, 4], 7) == {1: 3, 2: 6}
    assert gaps([2], 3) == {}  # what lies before the first kept block has no layer to be fitted


def test_one_number_by_hand() -> None:
    fit = Fit()
    fit.add(torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([1.0]))
    fit.add(torch.tensor([[2.0]]), torch.tensor([[8.0]]), torch.tensor([0.5]))
    # Inputs times w are 1 and 1, outputs 2 and 4: D = (2 + 4) / (2 + RIDGE · 2) = 3 / (1 + RIDGE).
    change, after = fit.solve()
    assert float(change) == pytest.approx(3 / (1 + RIDGE), rel=1e-6)
    assert fit.before == 20.0
    assert after == pytest.approx(((2 - float(change)) ** 2 + (4 - float(change)) ** 2) / 2, rel=1e-5)


def test_it_is_the_least_squares_solution_with_the_ridge_as_rows_of_its_own() -> None:
    torch.manual_seed(0)
    x, y, w = torch.randn(50, 6), torch.randn(50, 4), torch.rand(50) + 0.1
    fit = Fit()
    for part in range(0, 50, 20):
        fit.add(x[part : part + 20], y[part : part + 20], w[part : part + 20])
    scaled = (x * w[:, None]).double()
    held = torch.eye(6, dtype=torch.float64) * (RIDGE * scaled.square().sum(dim=0).mean()).sqrt()
    wanted = torch.cat([(y * w[:, None]).double(), torch.zeros(6, 4, dtype=torch.float64)])
    oracle = torch.linalg.lstsq(torch.cat([scaled, held]), wanted).solution
    assert torch.allclose(fit.solve()[0], oracle, rtol=1e-4, atol=1e-6)


def test_numbers_that_are_not_finite_are_refused() -> None:
    fit = Fit()
    fit.add(torch.tensor([[float("inf")]]), torch.tensor([[1.0]]), torch.tensor([1.0]))
    with pytest.raises(UsageError, match="not finite"):
        fit.solve()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_fitted_or_refused(family: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm, out = tiny_checkpoint(family), tmp_path / "proxy"
    if family in NOT_JUST_ADDED:
        with pytest.raises(UsageError, match="refit = 0"):
            refitted(llm, out)
        return
    record = refitted(llm, out)
    assert [gap["block"] for gap in record["gaps"]] == [0, 2]
    assert all(gap["after"] < gap["before"] for gap in record["gaps"])
    untouched = tmp_path / "untouched"
    untouched.mkdir()
    prune(open_source(llm), KEEP, untouched)
    before, after = (load_file(path / "model.safetensors") for path in (untouched, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 2
    assert all(name.endswith(f"{record['gaps'][0]['layer']}.weight") for name in changed)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in untouched.iterdir())


def test_what_is_recorded_is_what_the_files_give(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm, out = tiny_checkpoint(), tmp_path / "proxy"
    record = refitted(llm, out)
    whole, small = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (llm, out))
    tokenizer, found = load_tokenizer(llm), {0: [], 2: []}
    for text in split_documents(DOCUMENTS, HEAL, 0, wanted=HEAL.refit)[0]:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : HEAL.max_length]
        with (
            leaving(whole.model.layers, [1, 5]) as goals,
            leaving(small.model.layers, [0, 2]) as owns,
            torch.no_grad(),
        ):
            whole(ids)
            small(ids)
        for distances, own, goal in zip(found.values(), owns, goals, strict=True):
            distances += ((own - goal).norm(dim=-1) / goal.norm(dim=-1)).square().flatten().tolist()
    for gap in record["gaps"]:
        distances = found[gap["block"]]
        assert sum(distances) / len(distances) == pytest.approx(gap["after"], rel=1e-3)
    assert record["tokens"] == len(found[0])


def test_streamed_from_its_files_it_is_the_same(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for out, placement in ((one, "memory"), (other, "stream")):
        refitted(tiny_checkpoint(), out, placement=placement)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_tokens_that_the_llm_does_not_know_are_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint(vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ArtifactError, match=r"\b100\b"):
        refitted(llm, tmp_path / "proxy")


def test_blocks_that_are_spared_stay(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    record = refitted(tiny_checkpoint(), tmp_path / "proxy", trained=[1, 2])
    assert [gap["block"] for gap in record["gaps"]] == [2]
    with pytest.raises(UsageError, match="spare_ends"):
        refitted(tiny_checkpoint(), tmp_path / "none", trained=[])


@pytest.mark.parametrize("steps", [0, 2])
def test_compress_refits_before_it_heals(
    steps: int, tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    sheets: list[dict[str, Any]] = []
    settings = {"batch_size": 2, "max_length": 24, "lora_r": 2}
    out, heal = tmp_path / "proxy", Heal(refit=4, steps=steps, **settings)
    compress(tiny_checkpoint(), out, calibration=calibration, max_length=24, heal=heal, on_sheet=sheets.append)
    made = Manifest.read(out).settings
    assert made["healed"] is sheets[0]["healed"] is True
    assert made["refit"]["documents"] == 4
    assert made["refit"]["gaps"]
    assert ("heal" in made) == (steps > 0)
    if steps:
        assert made["heal"]["perplexity"]["before"] == pytest.approx(made["refit"]["perplexity"]["after"], rel=1e-6)


def test_where_nothing_is_removed_nothing_is_fitted(
    tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    out, llm = tmp_path / "proxy", tiny_checkpoint()
    compress(llm, out, remove=0.0, calibration=calibration, max_length=24, heal=Heal(refit=4, max_length=24))
    settings = Manifest.read(out).settings
    assert settings["healed"] is settings["exposure"]["healed"] is False
    assert "refit" not in settings
    one, other = (load_file(path / "model.safetensors") for path in (llm, out))
    assert all(torch.equal(one[name], other[name]) for name in one)
