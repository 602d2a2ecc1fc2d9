import math

import pytest
import torch
from torch import nn

from fedproxy.compression.scores.block_influence import block_influence, cosine
from fedproxy.models.block_stream import BlockStream
from fedproxy.models.families import blocks
from tests.compression.scores.streams import enter, score, tokens
from tests.conftest import FAMILIES, make_model


def test_cosine_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 2.0], [0.0, 0.0], [1e-30, 0.0]])
    y = torch.tensor([[4.0, 3.0], [0.0, 2.0], [-2.0, -4.0], [1.0, 1.0], [1e-30, 1e-30]])
    assert cosine(x, y).tolist() == pytest.approx([24 / 25, 0.0, -1.0, 0.0, 0.5**0.5])


class Turn(nn.Module):
    """A block that turns the first two coordinates by `angle`."""

    def __init__(self, angle: float, number: int) -> None:
        super().__init__()
        self.layer_idx = number
        self.angle = angle

    def forward(self, hidden_states: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
        c, s = math.cos(self.angle), math.sin(self.angle)
        x, y, rest = hidden_states[..., :1], hidden_states[..., 1:2], hidden_states[..., 2:]
        return torch.cat([c * x - s * y, s * x + c * y, rest], -1)


def turning(*angles: float) -> BlockStream:
    """Blocks that turn the hidden state of token 1 by known angles, and that of token 2 not at all."""
    model = make_model(num_hidden_layers=len(angles))
    for i, angle in enumerate(angles):
        model.model.layers[i] = Turn(angle, i)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[1, 0] = 2.0
        model.model.embed_tokens.weight[2, 5] = 3.0
    return BlockStream(model)


HAND = (torch.tensor([[1, 2, 1, 1], [1, 1, 1, 2]]), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
"""Of the four tokens that are no padding, three turn."""


def test_block_influence_by_hand() -> None:
    angles = [0.3, 0.0, math.pi, 1.2]
    stream = turning(*angles)
    found = score("block-influence", stream, enter(stream, HAND))
    assert found.scores == pytest.approx([1 - (3 * math.cos(angle) + 1) / 4 for angle in angles], abs=1e-6)
    assert found.removals == [[], [1], [0, 1], [0, 1, 3]]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ordinary_forward_pass_with_hooks_agrees(family: str) -> None:
    """The oracle knows nothing of streams: hooks on an ordinary model, cosines by torch."""
    model, (ids, mask) = make_model(family), tokens(5, 9, 14)
    seen: list[torch.Tensor] = []

    def note(_module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], out: object) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        leaving = out[0] if isinstance(out, tuple) else out
        assert isinstance(leaving, torch.Tensor)
        seen.append(nn.functional.cosine_similarity(entering, leaving, dim=-1)[mask.bool()].mean())

    handles = [block.register_forward_hook(note, with_kwargs=True) for block in blocks(model)]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    stream = BlockStream(model)
    found = score("block-influence", stream, enter(stream, (ids, mask)))
    assert found.scores == pytest.approx([1 - float(value) for value in seen], abs=1e-6)
    assert all(0 < value < 2 for value in found.scores)


def test_the_last_block_is_taken_before_the_final_norm() -> None:
    model = make_model()
    stream, text = BlockStream(model), tokens(7)
    before = score("block-influence", stream, enter(stream, text)).scores
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(-3, 5, 32))
    assert score("block-influence", stream, enter(stream, text)).scores == before


def test_progress_is_told() -> None:
    stream, told = BlockStream(make_model(num_hidden_layers=2)), list[float]()
    passages = enter(stream, tokens(3), tokens(4))
    block_influence(stream, passages, most=1, among=range(len(stream)), seed=0, progress=told.append)
    assert told == [0.25, 0.5, 0.75, 1.0]
