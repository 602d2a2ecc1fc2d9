import numpy as np
import pytest
from scipy import stats

from fedproxy.privacy.randomness import Randomness


@pytest.mark.parametrize("seed", [None, 0])
def test_the_draws_have_their_distribution(seed):
    """Kolmogorov and Smirnov's test, at a level that a right generator fails once in 10^7 runs."""
    drawn = Randomness(seed)
    assert stats.kstest(drawn.normal(200_000).numpy(), "norm").pvalue > 1e-7
    assert stats.kstest(drawn.uniform(200_000), "uniform").pvalue > 1e-7


def test_the_noise_is_neither_skewed_nor_correlated():
    first, second = Randomness().normal(2**20 + 1), Randomness().normal(2**20 + 1)
    for values in (first, second):
        assert abs(float(values.mean())) < 6e-3
        assert float(values.var()) == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(first, second)[0, 1]) < 6e-3


def test_rows_take_part_independently_of_each_other():
    drawn = Randomness(0)
    counts = np.array([len(drawn.chosen(50, 0.1)) for _ in range(4000)])
    expected = 4000 * stats.binom(50, 0.1).pmf(np.arange(13))
    found = np.bincount(np.minimum(counts, 12), minlength=13)
    expected[12] = 4000 - expected[:12].sum()
    assert stats.chisquare(found, expected).pvalue > 1e-7
    assert counts.min() == 0, "an empty batch is one of the batches"


def test_a_seed_gives_the_same_again_and_none_never():
    assert Randomness(7).normal(100).equal(Randomness(7).normal(100))
    assert Randomness(7).chosen(100, 0.5) == Randomness(7).chosen(100, 0.5)
    assert Randomness(7).seed() == Randomness(7).seed()
    assert not Randomness().normal(100).equal(Randomness().normal(100))
    assert Randomness().seed() != Randomness().seed()


def test_the_certain_and_the_impossible():
    assert Randomness().chosen(100, 1.0) == list(range(100))
    assert Randomness().chosen(100, 0.0) == []
