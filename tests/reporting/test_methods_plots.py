import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.reporting.plots import beside, spread_out


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.001, 0.2))
def test_names_keep_their_order_and_distance_within_the_axes(places, gap):
    wanted = sorted(places, reverse=True)
    found = spread_out(wanted, gap)
    gap = min(gap, 1 / len(wanted))
    assert all(above - below >= gap - 1e-9 for above, below in itertools.pairwise(found))
    assert found[0] <= 1 - gap / 2 + 1e-9
    assert found[-1] >= gap / 2 - 1e-9


def test_names_that_have_room_stay_where_they_are():
    assert spread_out([0.9, 0.5, 0.1], 0.2) == pytest.approx([0.9, 0.5, 0.1])


def test_names_that_have_none_move_as_little_as_can_be():
    assert spread_out([0.5, 0.5], 0.2) == pytest.approx([0.6, 0.4])
    assert spread_out([1.0, 1.0, 0.1], 0.2) == pytest.approx([0.9, 0.7, 0.1])


SPAN = st.tuples(st.floats(0, 100), st.floats(0, 100)).map(sorted)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.01, 50.0, 100.0]), SPAN), min_size=1, max_size=20))
def test_no_mark_hides_another(marks):
    costs, spans = [cost for cost, _ in marks], [span for _, span in marks]
    places = beside(costs, spans, first=[len(marks) - 1])
    assert places[-1] == costs[-1]
    step = 0.022 * (max(costs) - min(costs) or 1.0)
    for index, (low, high) in enumerate(spans):
        for other in range(index):
            apart = abs(places[index] - places[other]) >= 0.9 * step - 1e-9
            assert apart or high < spans[other][0] or low > spans[other][1]


def test_a_mark_alone_at_its_cost_stays_there():
    assert beside([0.0, 50.0, 100.0], [(1, 2)] * 3) == [0.0, 50.0, 100.0]
