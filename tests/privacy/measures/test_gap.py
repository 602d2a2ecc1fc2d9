import numpy as np
import pytest

from fedproxy.errors import UsageError
from fedproxy.privacy.measures.gap import share_of_gap


def drawn(generator, accuracy, count=200):
    return {"task": (generator.random(count) < accuracy).astype(float).tolist()}


def test_by_hand_each_task_counting_the_same():
    bottom = {"a": [0, 0, 0, 0], "b": [0, 1]}  # mean 0.25
    top = {"a": [1, 1, 1, 1], "b": [1, 1]}  # mean 1
    model = {"a": [1, 0, 0, 0], "b": [1, 1]}  # mean 0.625
    assert share_of_gap(model, bottom, top, seed=0).value == pytest.approx((0.625 - 0.25) / 0.75)


def test_the_ends_have_the_shares_0_and_1_for_certain():
    generator = np.random.default_rng(0)
    bottom, top = drawn(generator, 0.2), drawn(generator, 0.6)
    for model, share in ((bottom, 0.0), (top, 1.0)):
        found = share_of_gap(model, bottom, top, seed=0)
        assert (found.value, found.low, found.high) == (share, share, share)


def test_no_share_of_a_gap_that_documents_do_not_tell():
    generator = np.random.default_rng(0)
    bottom, same, better = drawn(generator, 0.3), drawn(generator, 0.32), drawn(generator, 0.8)
    assert share_of_gap(better, bottom, same, seed=0) is None
    assert share_of_gap(same, better, bottom, seed=0) is None  # the other way round
    assert share_of_gap(same, bottom, better, seed=0) is not None


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    generator, held = np.random.default_rng(1), 0
    for number in range(200):
        found = share_of_gap(*(drawn(generator, accuracy) for accuracy in (0.5, 0.2, 0.7)), seed=number, draws=200)
        held += found.low <= 0.6 <= found.high
    assert 0.88 < held / 200 < 0.99


@pytest.mark.parametrize(
    "scores", [({}, {}, {}), ({"a": []},) * 3, ({"a": [1]}, {"a": [1]}, {"a": [1, 0]}), ({"a": [1]}, {}, {"a": [1]})]
)
def test_other_documents_are_refused(scores):
    with pytest.raises(UsageError, match="same documents"):
        share_of_gap(*scores, seed=0)
