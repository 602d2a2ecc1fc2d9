import numpy as np
import pytest

from fedproxy.comparison.statistics import paired_difference
from fedproxy.errors import UsageError


def test_by_hand():
    # One task of two documents: d = (1, 0) with seed 0 and (1, 1) with seed 1, so d_i = (1, 0.5), D = 0.75; samples of
    # two documents have the means 0.5 (1/4), 0.75 (1/2), 1 (1/4).
    found = paired_difference({"t": [[1, 0], [1, 1]]}, {"t": [[0, 0], [0, 0]]}, seed=0)
    assert (found.mean, found.by_seed) == (0.75, [0.5, 1.0])
    assert (found.low, found.high, found.verdict) == (0.5, 1.0, "better")


def test_a_seed_that_says_the_opposite_leaves_it_undecided():
    # With seed 0 all nine documents differ by 1, with seed 1 one by -1: the mean is (1 - 1/9) / 2.
    found = paired_difference({"t": [[1] * 9, [0] * 9]}, {"t": [[0] * 9, [0] * 8 + [1]]}, seed=0)
    assert found.mean == pytest.approx(4 / 9)
    assert found.low > 0 > found.by_seed[1]
    assert found.verdict == "undecided"


def test_tasks_count_alike_whatever_their_size():
    found = paired_difference({"a": [[1] * 90], "b": [[0] * 10]}, {"a": [[0] * 90], "b": [[1] * 10]}, seed=0)
    assert (found.mean, found.low, found.high, found.verdict) == (0.0, 0.0, 0.0, "undecided")


def test_the_other_way_round_is_the_negative():
    generator = np.random.default_rng(1)
    x, y = ({"t": generator.integers(2, size=(2, 50)).tolist()} for _ in range(2))
    one, other = paired_difference(x, y, seed=3), paired_difference(y, x, seed=3)
    assert one.mean == pytest.approx(-other.mean)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert paired_difference(x, y, seed=3) == one


def test_pairing_tells_what_independent_samples_could_not():
    generator = np.random.default_rng(2)
    hard = generator.uniform(size=200) < 0.5
    x, y = hard.astype(float), hard.astype(float)
    y[np.flatnonzero(hard)[:12]] = 0.0  # 6 points apart, where the means' own standard errors are 3.5 points each
    assert paired_difference({"t": [x]}, {"t": [y]}, seed=0).verdict == "better"


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    generator = np.random.default_rng(0)
    true, held, trials = 0.05, 0, 400
    for trial in range(trials):
        shared = generator.uniform(size=(2, 150))
        scores = {str(t): [(shared[t] < 0.6 + true).tolist()] for t in range(2)}
        others = {str(t): [(generator.uniform(size=150) < 0.6).tolist()] for t in range(2)}
        found = paired_difference(scores, others, seed=trial, draws=400)
        held += found.low <= true <= found.high
    assert 0.92 <= held / trials <= 0.98


@pytest.mark.parametrize(
    ("scores", "others"),
    [
        ({}, {}),
        ({"a": [[1.0]]}, {"b": [[1.0]]}),
        ({"a": [[1.0]]}, {"a": [[1.0], [0.0]]}),
        ({"a": [[1.0, 0.0]]}, {"a": [[1.0]]}),
        ({"a": [[]]}, {"a": [[]]}),
        ({"a": [[1.0]], "b": [[1.0], [1.0]]}, {"a": [[1.0]], "b": [[1.0], [1.0]]}),
    ],
)
def test_what_cannot_be_paired_is_refused(scores, others):
    with pytest.raises(UsageError):
        paired_difference(scores, others, seed=0)
