import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedproxy.compression.select import between, lowest, removed_count, rounded_down
from fedproxy.errors import UsageError


def test_by_hand() -> None:
    assert lowest([0.9, 0.1, 0.5, 0.3, 0.7], 3, range(5)) == [[], [1], [1, 3], [1, 2, 3]]
    assert lowest([0.2, 0.2, 0.2, 0.2], 2, range(4)) == [[], [3], [2, 3]]
    assert lowest([0.1, 0.2, 0.3, 0.2], 2, range(4)) == [[], [0], [0, 3]]


@pytest.mark.parametrize(
    ("remove", "blocks", "removed"),
    [(0.3, 10, 3), (0.29, 100, 29), (0.57, 100, 57), (1 / 3, 3, 1), (0.5, 7, 3), (0.99, 100, 99), (0.0, 6, 0)],
)
def test_the_number_removed_is_rounded_down_but_not_by_float_error(remove: float, blocks: int, removed: int) -> None:
    assert removed_count(blocks, remove) == removed


@given(st.integers(1, 200), st.integers(0, 99))
def test_whole_percents_are_exact(blocks: int, percent: int) -> None:
    assert rounded_down(blocks, percent / 100) == blocks * percent // 100


@given(st.integers(2, 200))
def test_the_least_share_that_is_named_removes_one_block(blocks: int) -> None:
    with pytest.raises(UsageError, match=rf"\b{blocks} blocks") as refused:
        removed_count(blocks, 0.99 / blocks)
    least = re.search(r"Choose (\S+) at least, or 0 to keep them all", str(refused.value))
    assert least is not None
    assert removed_count(blocks, float(least[1])) == 1
    assert removed_count(blocks, 0.0) == 0


def test_no_share_of_a_single_block_can_go() -> None:
    with pytest.raises(UsageError, match=r"\b1 blocks"):
        removed_count(1, 0.9)


@given(st.lists(st.floats(0, 2), min_size=1, max_size=40), st.data())
def test_no_removed_block_outscores_a_kept_one(scores: list[float], data: st.DataObject) -> None:
    most = data.draw(st.integers(0, len(scores) - 1))
    removals = lowest(scores, most, range(len(scores)))
    assert [len(removed) for removed in removals] == list(range(most + 1))
    kept = set(range(len(scores))) - set(removals[most])
    assert removals[most] == sorted(removals[most])
    assert all((scores[i], -i) > (scores[j], -j) for i in kept for j in removals[most])


@pytest.mark.parametrize("remove", [-0.1, 1.0, 1.5, float("nan"), float("inf"), 0.9999999999999])
def test_impossible_shares_are_refused(remove: float) -> None:
    with pytest.raises(UsageError, match="remove"):
        removed_count(2, remove)


def test_ends_that_are_kept_leave_the_blocks_between() -> None:
    assert between(6, 0, 0, 6) == range(6)
    assert between(6, 2, 1, 3) == range(2, 5)
    assert len(between(6, 4, 4, 0)) == 0
    for first, last, removed in ((2, 1, 4), (4, 4, 1)):
        with pytest.raises(UsageError, match="keep_first"):
            between(6, first, last, removed)
