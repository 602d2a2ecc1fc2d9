import math

import pytest
import torch
from torch import nn

from fedproxy.compression.calibrate import Batch
from fedproxy.compression.scores.block_influence import block_influence, cosine
from fedproxy.models.families import blocks
from tests.conftest import BLOCKS, FAMILIES, make_model


def silent(_fraction: float) -> None:
    """Report nothing."""


def batch(*lengths: int) -> Batch:
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    ids = torch.randint(0, 256, mask.shape, generator=torch.Generator().manual_seed(0))
    return Batch(torch.where(mask.bool(), ids, 256), mask)


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


def test_block_influence_by_hand() -> None:
    """Blocks that turn by known angles; the first coordinate plane holds the whole hidden state of token 1 only."""
    angles = [0.3, 0.0, math.pi, 1.2]
    model = make_model(num_hidden_layers=4)
    for i, angle in enumerate(angles):
        model.model.layers[i] = Turn(angle, i)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[1, 0] = 2.0
        model.model.embed_tokens.weight[2, 5] = 3.0
    tokens = Batch(torch.tensor([[1, 2, 1, 1], [1, 1, 1, 2]]), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
    expected = [1 - (3 * math.cos(angle) + 1) / 4 for angle in angles]
    assert block_influence(model, [tokens], silent) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_batching_do_not_matter(family: str) -> None:
    model, padded = make_model(family), batch(5, 9, 14)
    single = [
        Batch(ids[None, : int(mask.sum())], mask[None, : int(mask.sum())])
        for ids, mask in zip(padded.input_ids, padded.attention_mask, strict=True)
    ]
    together = block_influence(model, [padded], silent)
    assert together == pytest.approx(block_influence(model, single, silent), abs=1e-6)
    assert len(together) == BLOCKS
    assert all(0 < score < 2 for score in together)


def test_the_last_block_is_taken_before_the_final_norm() -> None:
    model, text = make_model(), batch(7)
    seen: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        states = model(text.input_ids, output_hidden_states=True).hidden_states
    handle.remove()
    cosines = torch.nn.functional.cosine_similarity(states[-2], seen[0], dim=-1)
    assert block_influence(model, [text], silent)[-1] == pytest.approx(1 - float(cosines.mean()), abs=1e-6)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(-3, 5, 32))
    assert block_influence(model, [text], silent)[-1] == pytest.approx(1 - float(cosines.mean()), abs=1e-6)


def test_hooks_are_gone_and_progress_is_told() -> None:
    model, told = make_model(), list[float]()
    block_influence(model, [batch(3), batch(4)], told.append)
    assert told == [0.5, 1.0]
    assert not any(block._forward_hooks for block in blocks(model))
