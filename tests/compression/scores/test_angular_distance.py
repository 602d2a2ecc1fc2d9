import math

import pytest
import torch

from fedproxy.models.block_stream import BlockStream
from tests.compression.scores.streams import enter, score, tokens
from tests.compression.scores.test_block_influence import HAND, turning
from tests.conftest import make_model


def turned(*angles: float) -> float:
    """The distance of a run of blocks that turn by these angles: three of four tokens turn."""
    total = abs(sum(angles)) % (2 * math.pi)
    return 0.75 * min(total, 2 * math.pi - total) / math.pi


def test_by_hand() -> None:
    """Blocks 2 and 3 turn far, and back again: as a run they are the best, one by one the worst."""
    angles = [0.2, 0.3, 1.5, -1.45, 0.4]
    stream = turning(*angles)
    found = score("angular-distance", stream, enter(stream, HAND))
    assert found.removals == [[], [0], [2, 3], [1, 2, 3]]
    runs = [turned(*angles[start : start + 3]) for start in range(3)]
    expected = [runs[0], min(runs[:2]), min(runs), min(runs[1:]), runs[2]]
    assert found.scores == pytest.approx(expected, abs=1e-6)
    assert score("angular-distance", stream, enter(stream, HAND), most=0).scores == pytest.approx(
        [turned(angle) for angle in angles], abs=1e-6
    )


def test_of_equal_runs_the_later_one_goes() -> None:
    stream = turning(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert score("angular-distance", stream, enter(stream, HAND)).removals[1:3] == [[5], [4, 5]]


def test_distances_of_an_ordinary_forward_pass_agree() -> None:
    model, (ids, mask) = make_model("gpt2"), tokens(5, 9)
    last: list[torch.Tensor] = []
    model.transformer.ln_f.register_forward_pre_hook(lambda _module, args: last.append(args[0]))
    with torch.no_grad():
        states = [*model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[:-1], last[0]]
    stream = BlockStream(model)
    found = score("angular-distance", stream, enter(stream, (ids, mask)), most=2)

    def distance(start: int, run: int) -> float:
        cosines = torch.nn.functional.cosine_similarity(states[start].double(), states[start + run].double(), dim=-1)
        return float(cosines.arccos()[mask.bool()].mean() / math.pi)

    best = [min(range(7 - run), key=lambda start: distance(start, run)) for run in (1, 2)]
    assert found.removals == [[], [best[0]], [best[1], best[1] + 1]]
    assert found.scores[0] == pytest.approx(distance(0, 2), abs=1e-6)
    assert found.scores[-1] == pytest.approx(distance(4, 2), abs=1e-6)
