import pytest

from fedproxy.compression.scores.uniform import evenly_spread
from fedproxy.models.block_stream import BlockStream
from tests.compression.scores.streams import score
from tests.conftest import make_model


@pytest.mark.parametrize(
    ("blocks", "kept", "expected"),
    [
        (6, 1, [0]),
        (6, 2, [0, 5]),
        (6, 3, [0, 2, 5]),
        (6, 4, [0, 2, 3, 5]),
        (12, 6, [0, 2, 4, 7, 9, 11]),
        (12, 12, list(range(12))),
        (24, 8, [0, 3, 7, 10, 13, 16, 20, 23]),
        (1, 1, [0]),
    ],
)
def test_by_hand(blocks: int, kept: int, expected: list[int]) -> None:
    assert evenly_spread(blocks, kept) == expected


def test_every_number_of_kept_blocks_is_kept() -> None:
    for blocks in range(1, 60):
        for kept in range(1, blocks + 1):
            chosen = evenly_spread(blocks, kept)
            assert chosen == sorted(set(chosen))
            assert (len(chosen), chosen[0]) == (kept, 0)
            assert kept == 1 or chosen[-1] == blocks - 1


def test_what_goes_is_the_rest() -> None:
    found = score("uniform", BlockStream(make_model()), [], most=3)
    assert found.removals == [[], [3], [1, 4], [1, 3, 4]]
    assert found.scores == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
