from collections import Counter

import pytest

from fedproxy.models.block_stream import BlockStream
from tests.compression.scores.streams import score
from tests.conftest import make_model


def test_scores_are_the_order_in_which_blocks_go() -> None:
    found = score("random", BlockStream(make_model()), [], most=5, seed=3)
    assert sorted(found.scores) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    order = sorted(range(6), key=lambda block: found.scores[block])
    assert found.removals == [sorted(order[:n]) for n in range(6)]


def test_every_block_goes_first_equally_often() -> None:
    stream = BlockStream(make_model())
    first = Counter(score("random", stream, [], most=1, seed=seed).removals[1][0] for seed in range(600))
    assert [first[block] for block in range(6)] == pytest.approx([100] * 6, abs=35)
