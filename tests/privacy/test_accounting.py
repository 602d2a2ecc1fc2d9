"""Oracles: examples of dp-accounting itself, and what any accountant must satisfy."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.errors import MissingExtraError, UsageError
from fedproxy.privacy import accounting
from fedproxy.privacy.accounting import Steps, default_delta, epsilon_of, noise_for


def test_the_example_of_dp_accounting_itself():
    """Its pld_privacy_accountant_test.py: three steps, sampled by 0.2, of noise 0.5, are (1, 0.15594)."""
    assert epsilon_of([Steps(0.2, 0.5, 3)], 0.15594) == pytest.approx(1, abs=1e-3)
    assert epsilon_of([Steps(0.2, 0.5, 1), Steps(0.2, 0.5, 2)], 0.15594) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("sampling", "count", "noise"), [(0.01, 1, 0.67379294682), (0.001, 25, 3.20956502598 / 6)])
def test_the_noise_that_dp_accounting_finds_itself(sampling, count, noise):
    """Its accountant_test.py, for a budget of (1, 1e-5)."""
    assert noise_for(1.0, 1e-5, sampling, count) == pytest.approx(noise, rel=1e-3)


def test_a_step_of_every_row_is_the_gaussian_mechanism():
    """Balle and Wang 2018 (arXiv 1805.06530), Theorem 8: δ(ε) in closed form."""

    def cdf(x):
        return (1 + math.erf(x / math.sqrt(2))) / 2

    for noise, epsilon in ((0.8, 2.0), (2.0, 0.5), (5.0, 0.1)):
        delta = cdf(1 / (2 * noise) - epsilon * noise) - math.exp(epsilon) * cdf(-1 / (2 * noise) - epsilon * noise)
        assert epsilon_of([Steps(1.0, noise, 1)], delta) == pytest.approx(epsilon, abs=1e-3)
        assert epsilon_of([Steps(1.0, 3 * noise, 9)], delta) == pytest.approx(epsilon, abs=1e-3)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.floats(0.2, 3), st.floats(0.05, 1), st.integers(5, 200), st.sampled_from([1e-3, 1e-5]))
def test_the_noise_of_a_budget_keeps_to_it_and_hardly_less_would_not(epsilon, sampling, count, delta):
    noise = noise_for(epsilon, delta, sampling, count)
    assert epsilon_of([Steps(sampling, noise, count)], delta) <= epsilon
    assert epsilon_of([Steps(sampling, noise / 1.05, count)], delta) > epsilon * 0.99


@settings(max_examples=5, deadline=None)
@given(st.floats(2, 5), st.floats(0.01, 0.5), st.integers(1, 50))
def test_more_steps_and_more_rows_cost_more_and_more_noise_costs_less(noise, sampling, count):
    one = epsilon_of([Steps(sampling, noise, count)], 1e-5)
    assert one <= epsilon_of([Steps(sampling, noise, count), Steps(sampling / 2, noise, 1)], 1e-5)
    assert one <= epsilon_of([Steps(sampling * 2, noise, count)], 1e-5)
    assert one >= epsilon_of([Steps(sampling, noise * 2, count)], 1e-5)


def test_an_epsilon_that_no_noise_reaches_is_an_error(monkeypatch):
    monkeypatch.setattr(accounting, "_MOST", math.log(4))
    with pytest.raises(UsageError, match="Choose a larger ε"):
        noise_for(0.02, 1e-6, 1.0, 10)


def test_nothing_costs_nothing_and_no_noise_costs_all():
    assert epsilon_of([], 1e-5) == 0
    assert epsilon_of([Steps(0.5, 1.0, 0)], 1e-5) == 0
    assert epsilon_of([Steps(0.5, 0.0, 1), Steps(0.5, 1.0, 1)], 1e-5) == math.inf


@given(st.integers(2, 10**9))
def test_delta_is_below_one_in_the_number_of_rows(rows):
    assert 0 < default_delta(rows) < 1 / rows


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setattr(accounting, "find_spec", lambda name: None)
    accounting._epsilon.cache_clear()
    with pytest.raises(MissingExtraError, match=r"fedproxy\[privacy\]"):
        epsilon_of([Steps(0.5, 1.0, 1)], 1e-5)
