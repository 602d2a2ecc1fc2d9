import math

import pytest
import torch

from fedproxy.errors import ArtifactError
from fedproxy.models.block_stream import BlockStream
from tests.compression.scores.streams import enter, score, tokens
from tests.compression.scores.test_block_influence import turning
from tests.conftest import make_model
from tests.in_memory import skipping


def test_by_hand() -> None:
    """Token 1 turned by an angle sum s has the logits (g cos s, 0) for tokens 1 and 2, all else far below."""
    angles = [0.9, 0.4, 0.1]
    stream = turning(*angles)
    model = stream.model
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.lm_head.weight[1, 0] = 1.0
    passages = enter(stream, (torch.tensor([[1, 1, 2]]), torch.tensor([[1, 1, 0]])))
    size = math.sqrt(32)

    def loss(*kept: float) -> float:
        """-log softmax of token 1; the norm makes the hidden state sqrt(32) long; 259 other tokens have logit 0."""
        logit = size * math.cos(sum(kept))
        return math.log(math.exp(logit) + 259) - logit

    found = score("perplexity", stream, passages, most=2)
    whole = loss(*angles)
    assert found.removals == [[], [0], [0, 1]]
    first, second = loss(0.4, 0.1) - whole, loss(0.1) - whole
    assert second < first < 0
    assert found.scores == pytest.approx([first, first, max(first, loss(0.4) - whole)], abs=1e-5)
    assert score("perplexity", stream, passages, most=0).scores == pytest.approx(
        [loss(0.4, 0.1) - whole, loss(0.9, 0.1) - whole, loss(0.9, 0.4) - whole], abs=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "bloom"])
def test_greedy_search_with_an_ordinary_model_agrees(family: str) -> None:
    model, (ids, mask) = make_model(family), tokens(6, 11)
    labels = torch.where(mask.bool(), ids, -100)

    def loss(skipped: list[int]) -> float:
        with torch.no_grad(), skipping(model, skipped):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:]))

    gone: list[int] = []
    expected, floor = [0.0] * 6, -math.inf
    for _ in range(3):
        tried = {block: loss([*gone, block]) - loss([]) for block in range(6) if block not in gone}
        goes = min(tried, key=lambda block: tried[block])
        floor = max(floor, tried[goes])
        expected = [max(floor, tried[i]) if i in tried else expected[i] for i in range(6)]
        gone.append(goes)
    stream = BlockStream(model)
    found = score("perplexity", stream, enter(stream, (ids, mask)))
    assert found.removals == [sorted(gone[:n]) for n in range(4)]
    assert found.scores == pytest.approx(expected, abs=1e-5)
    in_order = [found.scores[block] for block in gone]
    assert in_order == sorted(in_order)
    assert min(found.scores[i] for i in range(6) if i not in gone) >= in_order[-1]


def test_text_without_a_second_token_is_refused() -> None:
    stream = BlockStream(make_model())
    with pytest.raises(ArtifactError, match="two tokens"):
        score("perplexity", stream, enter(stream, tokens(1, 1)))


def test_an_overflow_is_refused() -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("inf"))
    stream = BlockStream(model)
    with pytest.raises(ArtifactError, match="bfloat16"):
        score("perplexity", stream, enter(stream, tokens(5)))
