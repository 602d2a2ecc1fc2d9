import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedproxy.compression.select import select
from fedproxy.errors import ArtifactError, UsageError


def test_by_hand() -> None:
    assert select([0.9, 0.1, 0.5, 0.3, 0.7], 0.5) == [0, 2, 4]
    assert select([0.9, 0.1, 0.5, 0.3, 0.7], 0.0) == [0, 1, 2, 3, 4]
    assert select([0.2, 0.2, 0.2, 0.2], 0.5) == [0, 1]
    assert select([0.1, 0.2, 0.3, 0.2], 0.5) == [1, 2]


@pytest.mark.parametrize(
    ("remove", "blocks", "removed"),
    [(0.3, 10, 3), (0.29, 100, 29), (0.57, 100, 57), (1 / 3, 3, 1), (0.5, 7, 3), (0.99, 100, 99), (0.9, 1, 0)],
)
def test_the_number_removed_is_rounded_down_but_not_by_float_error(remove: float, blocks: int, removed: int) -> None:
    assert blocks - len(select([1.0] * blocks, remove)) == removed


@given(st.integers(1, 200), st.integers(0, 99))
def test_whole_percents_are_exact(blocks: int, percent: int) -> None:
    assert len(select([0.0] * blocks, percent / 100)) == blocks - blocks * percent // 100


@given(st.lists(st.floats(0, 2), min_size=1, max_size=40), st.floats(0, 0.99))
def test_no_removed_block_outscores_a_kept_one(scores: list[float], remove: float) -> None:
    kept = select(scores, remove)
    removed = set(range(len(scores))) - set(kept)
    assert kept == sorted(kept)
    assert all((scores[i], -i) > (scores[j], -j) for i in kept for j in removed)


@pytest.mark.parametrize("remove", [-0.1, 1.0, 1.5, float("nan"), float("inf"), 0.9999999999999])
def test_impossible_shares_are_refused(remove: float) -> None:
    with pytest.raises(UsageError, match="remove"):
        select([0.1, 0.2], remove)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ArtifactError, match="block 1 is NaN"):
        select([0.1, float("nan")], 0.5)
