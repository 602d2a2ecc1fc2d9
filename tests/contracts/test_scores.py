"""What every score of blocks must hold; a new row of `SCORES` is tested without a line here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedproxy.compression.scores import SCORES
from fedproxy.models.block_stream import BlockStream
from tests.compression.scores.streams import enter, placed, score, sharded, tokens
from tests.conftest import BLOCKS, FAMILIES, MULTIMODAL, make_model

READERS = sorted(name for name, row in SCORES.items() if row.reads_text)
every_score = pytest.mark.parametrize("name", sorted(SCORES))
every_family = pytest.mark.parametrize("family", [*FAMILIES, *MULTIMODAL])


def scored(name: str, *batches: tuple[Any, Any], most: int = 3, seed: int = 0, family: str = "llama") -> Any:
    stream = BlockStream(make_model(family))
    return score(name, stream, enter(stream, *batches), most=most, seed=seed)


@every_score
@pytest.mark.parametrize("most", range(BLOCKS))
def test_what_comes_back(name: str, most: int) -> None:
    found = scored(name, tokens(4, 7), tokens(6), most=most)
    assert len(found.scores) == BLOCKS
    assert all(type(value) is float for value in found.scores)
    assert len(found.removals) == most + 1
    for count, removed in enumerate(found.removals):
        assert len(removed) == count
        assert removed == sorted(set(removed))
        assert set(removed) <= set(range(BLOCKS))


@every_score
def test_the_blocks_to_remove_have_the_lowest_scores(name: str) -> None:
    found = scored(name, tokens(4, 7))
    gone = found.removals[3]
    kept = [value for block, value in enumerate(found.scores) if block not in gone]
    assert max(found.scores[block] for block in gone) <= min(kept)


@every_score
@pytest.mark.parametrize("most", range(4))
def test_only_blocks_that_may_go_do_go(name: str, most: int) -> None:
    stream = BlockStream(make_model())
    found = score(name, stream, enter(stream, tokens(4, 7)), most=most, among=range(2, 5))
    assert [len(removed) for removed in found.removals] == list(range(most + 1))
    assert all(set(removed) <= {2, 3, 4} for removed in found.removals)


@every_score
def test_asking_for_fewer_gives_the_beginning(name: str) -> None:
    assert scored(name, tokens(4, 7), most=2).removals == scored(name, tokens(4, 7), most=4).removals[:3]


@every_score
def test_one_block_is_enough(name: str) -> None:
    stream = BlockStream(make_model(num_hidden_layers=1))
    found = score(name, stream, enter(stream, tokens(4)), most=0)
    assert (len(found.scores), found.removals) == (1, [[]])


@every_score
def test_passages_and_model_are_left_as_they_were(name: str) -> None:
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stream = BlockStream(model)
    passages = enter(stream, tokens(4, 7))
    entered = passages[0].hidden.clone()
    first = score(name, stream, passages)
    assert torch.equal(passages[0].hidden, entered)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert score(name, stream, passages) == first


@every_score
def test_batches_may_come_in_any_order(name: str) -> None:
    batches = [tokens(4, 7), tokens(6, 2, seed=1), tokens(9, seed=2)]
    found, other = scored(name, *batches), scored(name, *reversed(batches))
    assert other.scores == pytest.approx(found.scores, abs=1e-6)
    assert other.removals == found.removals


def without_padding(batch: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    ids, mask = batch
    return [(row[None, : int(m.sum())], m[None, : int(m.sum())]) for row, m in zip(ids, mask, strict=True)]


@every_score
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "mixtral", "bloom"])
def test_padding_and_batching_do_not_matter(name: str, family: str) -> None:
    batch = tokens(5, 9, 14)
    found = scored(name, batch, family=family)
    variants: Sequence[list[tuple[Any, Any]]] = (
        without_padding(batch),
        [tokens(5, 9, 14, width=20)],
        [tokens(5, 9, 14, padding=7)],
    )
    for batches in variants:
        other = scored(name, *batches, family=family)
        assert other.scores == pytest.approx(found.scores, abs=1e-5)
        assert other.removals == found.removals


@every_score
def test_the_same_seed_gives_the_same(name: str) -> None:
    assert scored(name, tokens(4, 7), seed=5) == scored(name, tokens(4, 7), seed=5)


@every_score
def test_progress_rises_to_one(name: str) -> None:
    stream, told = BlockStream(make_model()), list[float]()
    passages = enter(stream, tokens(4), tokens(6))
    SCORES[name].score(stream, passages, most=2, among=range(BLOCKS), seed=0, progress=told.append)
    assert told == sorted(told)
    assert told[0] > 0
    assert told[-1] == 1.0


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("most", range(BLOCKS))
def test_a_token_passes_as_many_blocks_and_heads_as_the_row_says(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = {"run": 0, "losses": 0}

    def counting(method: str) -> Any:
        own = getattr(BlockStream, method)

        def counted(*args: Any) -> Any:
            ran[method] += 1
            return own(*args)

        return counted

    stream = BlockStream(make_model())
    passages = enter(stream, tokens(4, 7))
    for method in ran:
        monkeypatch.setattr(BlockStream, method, counting(method))
    score(name, stream, passages, most=most)
    assert SCORES[name].passed(BLOCKS, BLOCKS - most) == (ran["run"], ran["losses"])


@pytest.mark.parametrize("name", sorted(set(SCORES) - set(READERS)))
def test_scores_that_read_no_text_do_without(name: str) -> None:
    assert scored(name) == scored(name, tokens(4, 7))


@every_family
def test_from_the_files_block_by_block_is_as_in_memory(family: str, tmp_path: Path) -> None:
    llm, batches = sharded(tmp_path, family), (tokens(4, 11), tokens(7, seed=1))
    streamed, loaded = placed(llm, "stream"), placed(llm, "memory")
    ordinary = BlockStream(make_model(family)) if family in FAMILIES else loaded
    for name in [*READERS, "magnitude"]:
        found = score(name, streamed, enter(streamed, *batches), most=2)
        assert all(weight.is_meta for block in streamed.blocks for weight in block.parameters())
        for other in (loaded, ordinary):
            expected = score(name, other, enter(other, *batches), most=2)
            assert found.scores == pytest.approx(expected.scores, abs=1e-5)
            assert found.removals == expected.removals
