import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedproxy.errors import UsageError
from fedproxy.privacy.measures.exposure import CHANCE, exposure, mean

LOSS = st.floats(-100, 100)


@given(LOSS, st.lists(LOSS, min_size=1, max_size=30))
def test_it_lies_between_nothing_and_the_number_of_ranks_and_falls_with_the_loss(secret, candidates):
    found = exposure(secret, candidates)
    assert -1e-9 <= found <= math.log2(len(candidates) + 1) + 1e-9
    assert found >= exposure(secret + 1.0, candidates)


def test_of_a_secret_drawn_as_the_others_it_is_chance_on_the_mean():
    generator = np.random.default_rng(0)
    drawn = [exposure(*(losses[0], losses[1:].tolist())) for losses in generator.normal(size=(4000, 256))]
    assert np.mean(drawn) == pytest.approx(CHANCE, abs=0.1)


def test_a_model_that_tells_nothing_apart_exposes_about_a_bit():
    assert exposure(1.0, [1.0] * 255) == pytest.approx(1.0, abs=0.02)


def test_a_mean_lies_within_its_interval_which_the_seed_draws():
    values = [1.0, 2.0, 3.0, 6.0]
    found = mean(values, seed=3)
    assert found.value == 3.0
    assert 1.0 <= found.low < 3.0 < found.high <= 6.0
    assert mean(values, seed=3) == found
    assert mean([4.0] * 5, seed=0) == mean([4.0], seed=1)


def test_what_has_no_answer_is_refused():
    with pytest.raises(UsageError, match="candidates"):
        exposure(1.0, [])
    with pytest.raises(UsageError, match="NaN"):
        exposure(math.nan, [1.0])
    with pytest.raises(UsageError, match="no exposures"):
        mean([], seed=0)
