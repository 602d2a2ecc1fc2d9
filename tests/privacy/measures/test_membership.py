import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from fedproxy.errors import UsageError
from fedproxy.privacy.measures.membership import auc, estimates, hits

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=20)


def test_by_hand():
    members, others = [0.9, 0.8, 0.4, 0.3], [0.7, 0.4, 0.2, 0.1]
    assert auc(members, others) == (4 + 4 + 2.5 + 2) / 16
    assert hits(members, others) == 2 / 4
    assert hits(members, others, 0.25) == 2 / 4  # above 0.4, of which one of four non-members is
    assert hits(members, others, 0.5) == 1.0


@given(SCORES, SCORES)
def test_the_area_is_that_of_scikit_learn(members, others):
    labels = [1] * len(members) + [0] * len(others)
    assert math.isclose(auc(members, others), roc_auc_score(labels, [*members, *others]))


@given(SCORES, SCORES, st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_hits_are_the_highest_point_of_the_curve_within_the_false_alarms(members, others, allowed):
    labels = [1] * len(members) + [0] * len(others)
    alarms, found, _ = roc_curve(labels, [*members, *others], drop_intermediate=False)
    assert math.isclose(hits(members, others, allowed), max(found[alarms <= allowed + 1e-12]))


def test_an_infinite_score_is_a_score():
    assert auc([math.inf, 0.0], [math.inf, -math.inf]) == (0.5 + 1 + 0 + 1) / 4


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    generator, inside = np.random.default_rng(0), 0
    truth = 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))  # P(difference > 0): its mean is half its standard deviation
    for trial in range(60):
        groups = [(generator.normal(math.sqrt(0.5), 1, 60), generator.normal(0, 1, 60))]
        found = estimates(groups, seed=trial, draws=200)["auc"]
        inside += found.low <= truth <= found.high
    assert 51 <= inside <= 60


def test_groups_of_different_levels_tell_nothing():
    low, high = np.linspace(0, 1, 30), np.linspace(100, 101, 30)
    assert estimates([(low[::10], low), (high, high[::10])], seed=0, draws=10)["auc"].value == pytest.approx(
        0.5, abs=0.03
    )


def test_several_groups_count_the_same():
    found = estimates([([1.0], [0.0]), ([0.0] * 50, [1.0] * 50)], seed=0, draws=10)
    assert found["auc"].value == found["hits"].value == 0.5
    assert found["auc"].low == found["auc"].high == 0.5


@pytest.mark.parametrize(("members", "others"), [([], [1.0]), ([1.0], []), ([math.nan], [1.0])])
def test_what_has_no_answer_is_refused(members, others):
    with pytest.raises(UsageError, match="members"):
        auc(members, others)
    with pytest.raises(UsageError, match="no scores"):
        estimates([], seed=0)
