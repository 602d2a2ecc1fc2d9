import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedproxy.compression.exposure import exposure, perplexities
from fedproxy.compression.prune import prune
from fedproxy.errors import ArtifactError
from fedproxy.models.block_stream import BlockStream
from fedproxy.models.checkpoints import load_model
from fedproxy.models.source import open_source
from tests.compression.scores.streams import enter, placed, sharded, tokens
from tests.conftest import FAMILIES, MULTIMODAL, make_model

KEEP = [0, 2, 5]


@pytest.mark.parametrize("family", [*FAMILIES, *MULTIMODAL])
def test_the_sheet_counts_what_the_proxy_holds(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(tiny_checkpoint(family))
    sheet = exposure(source, KEEP)
    prune(source, KEEP, tmp_path)
    proxy, llm = load_file(tmp_path / "model.safetensors"), load_file(source.path / "model.safetensors")
    assert sheet["tensors"] == len(proxy)
    assert sheet["parameters"] == sum(tensor.numel() for tensor in proxy.values())
    assert sheet["bytes"] == sum(tensor.nbytes for tensor in proxy.values())
    assert sheet["share"] == sheet["parameters"] / sum(tensor.numel() for tensor in llm.values())
    assert sum(row["tensors"] for row in sheet["leaves"] + sheet["stays"]) == len(llm)
    assert sum(row["bytes"] for row in sheet["leaves"] + sheet["stays"]) == sum(t.nbytes for t in llm.values())
    groups = [row["group"] for row in sheet["leaves"]]
    assert groups[:5] == ["embeddings", "block 0", "block 2", "block 5", "final norm"]
    assert set(groups[5:]) <= {"head", "other"}
    assert ("other" in groups) == (family == "opt")
    assert ("head" in groups) == (not source.decoder.config.tie_word_embeddings)
    rest = ["parts that are no text decoder"] if family in MULTIMODAL else []
    assert [row["group"] for row in sheet["stays"]] == ["block 1", "block 3", "block 4", *rest]
    assert (sheet["healed"], sheet["perplexity"]) == (False, None)


def test_by_hand(tmp_path: Path) -> None:
    """Width 32, inside 48, four heads of 8 of which two for keys and values, 260 tokens, untied."""
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    found = {"llm": 2.0, "proxy": 3.0, "tokens": 4}
    llm = sharded(tmp_path, "llama", dtype=torch.bfloat16)
    sheet = exposure(open_source(llm), [1, 4], perplexity=found, healed=True)
    expected = {"embeddings": 260 * 32, "block 1": block, "block 4": block, "final norm": 32, "head": 260 * 32}
    assert {row["group"]: row["parameters"] for row in sheet["leaves"]} == expected
    assert {row["group"]: row["bytes"] for row in sheet["leaves"]} == {k: 2 * v for k, v in expected.items()}
    assert [row["tensors"] for row in sheet["leaves"]] == [1, 9, 9, 1, 1]
    whole = 2 * 260 * 32 + 32 + 6 * block
    assert sheet["share"] == pytest.approx((whole - 4 * block) / whole)
    assert (sheet["healed"], sheet["perplexity"]) == (True, found)


def test_tied_weights_leave_once(tiny_checkpoint: Callable[..., Path]) -> None:
    source = open_source(tiny_checkpoint("llama", tie_word_embeddings=True))
    groups = [row["group"] for row in exposure(source, [0])["leaves"]]
    assert groups == ["embeddings", "block 0", "final norm"]


def test_a_checkpoint_of_the_bare_decoder_has_the_same_groups(tmp_path: Path) -> None:
    """Its names lack the part before the first dot, as those of the original GPT-2 do."""
    make_model("gpt2").transformer.save_pretrained(tmp_path)
    groups = [row["group"] for row in exposure(open_source(tmp_path), [3])["leaves"]]
    assert groups == ["embeddings", "block 3", "final norm"]


def perplexity(model: object, ids: torch.Tensor, mask: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits  # type: ignore[operator]
    labels = torch.where(mask.bool(), ids, -100)[:, 1:]
    return math.exp(torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "smollm3"])
def test_perplexities_are_those_of_the_models_themselves(family: str, tmp_path: Path) -> None:
    llm = sharded(tmp_path / "llm", family)
    (tmp_path / "proxy").mkdir()
    prune(open_source(llm), KEEP, tmp_path / "proxy")
    ids, mask = tokens(5, 9)
    for placement in ("stream", "memory"):
        stream = placed(llm, placement)
        passages = enter(stream, (ids, mask))
        before = passages[0].hidden.clone()
        found = perplexities(stream, passages, KEEP)
        assert found["llm"] == pytest.approx(perplexity(load_model(llm), ids, mask), rel=1e-5)
        assert found["proxy"] == pytest.approx(perplexity(load_model(tmp_path / "proxy"), ids, mask), rel=1e-5)
        assert found["tokens"] == 4 + 8
        assert torch.equal(passages[0].hidden, before)


def test_perplexity_by_hand() -> None:
    """A head of zeros gives every one of the 260 tokens the same probability."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    stream = BlockStream(model)
    found = perplexities(stream, enter(stream, tokens(4), tokens(2, 3)), [0])
    assert found == {"llm": pytest.approx(260), "proxy": pytest.approx(260), "tokens": 3 + 1 + 2}


def test_text_that_predicts_nothing_is_refused() -> None:
    stream = BlockStream(make_model())
    with pytest.raises(ArtifactError, match="two tokens"):
        perplexities(stream, enter(stream, tokens(1)), [0])
