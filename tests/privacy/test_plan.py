import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.config import Privacy, Train
from fedproxy.errors import UsageError
from fedproxy.privacy.accounting import epsilon_of
from fedproxy.privacy.plan import Plan, clipped_sum, noisy_mean
from fedproxy.privacy.randomness import Randomness


def gradients(rows, seed, scale):
    """Gradients of rows whose norms differ widely, of two parameters."""
    generator = torch.Generator().manual_seed(seed)
    size = scale * torch.exp(3 * torch.randn(rows, 1, generator=generator))
    return {
        "a": size[..., None] * torch.randn(rows, 4, 3, generator=generator),
        "b": size * torch.randn(rows, 7, generator=generator),
    }


def norm(parts):
    return float(sum(part.double().square().sum() for part in parts.values()) ** 0.5)


def without(found, number):
    return {name: torch.cat([part[:number], part[number + 1 :]]) for name, part in found.items()}


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**31), st.floats(1e-6, 1e6), st.floats(1e-3, 1e3), st.data())
def test_a_row_that_comes_or_goes_moves_the_sum_by_the_bound_at_most(rows, seed, scale, bound, data):
    found = gradients(rows, seed, scale)
    whole = clipped_sum(found, bound)
    less = clipped_sum(without(found, data.draw(st.integers(0, rows - 1))), bound)
    assert norm({name: whole[name].double() - less[name].double() for name in whole}) <= bound * (1 + 1e-6 * rows)
    assert norm(whole) <= rows * bound


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**31))
def test_one_row_is_clipped_to_the_bound_and_never_beyond(rows, seed):
    found = gradients(rows, seed, 1.0)
    for number in range(rows):
        one = {name: part[number : number + 1] for name, part in found.items()}
        assert norm(clipped_sum(one, 0.5)) <= 0.5
        assert norm(clipped_sum(one, 0.5)) == pytest.approx(min(0.5, norm(one)), rel=2e-5)


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(0, 2**31))
def test_a_bound_that_nothing_exceeds_gives_the_plain_sum(rows, seed):
    found = gradients(rows, seed, 1.0)
    for name, part in clipped_sum(found, 1e30).items():
        assert torch.allclose(part, found[name].sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_counts_as_zero(odd):
    found = gradients(3, 0, 1.0)
    found["a"][1, 0, 0] = odd
    expected = clipped_sum(without(found, 1), 1.0)
    assert all(part.equal(expected[name]) for name, part in clipped_sum(found, 1.0).items())


def test_the_noise_has_its_deviation_and_the_mean_is_of_the_rows_expected():
    total, randomness = torch.full((200_000,), 6.0), Randomness(0)
    found = noisy_mean(total, bound=0.5, noise=3.0, expected=4, randomness=randomness)
    assert float(found.mean()) == pytest.approx(1.5, abs=5e-3)
    assert float(found.std()) == pytest.approx(0.5 * 3.0 / 4, rel=0.01)
    assert noisy_mean(total, bound=0.5, noise=0.0, expected=4, randomness=randomness).equal(total / 4)


def test_a_plan_spends_its_budget_over_all_rounds_and_no_more():
    train = Train(batch_size=4, gradient_accumulation_steps=2)
    plan = Plan.of(Privacy(epsilon=1.0), train, rows=400, steps=5, rounds=3)
    assert (plan.batch, plan.sampling) == (8, 0.02)
    assert plan.delta == pytest.approx(400**-1.1)
    spent = [plan.spent(number) for number in range(4)]
    assert spent[0] == 0
    assert spent == sorted(spent)
    assert 0.99 < spent[3] <= 1.0
    assert spent[3] == epsilon_of([plan.cost(1)] * 3, plan.delta)


def test_fewer_rows_than_a_batch_all_take_part():
    plan = Plan.of(Privacy(epsilon=3.0, delta=1e-3), Train(batch_size=64), rows=10, steps=1, rounds=1)
    assert (plan.sampling, plan.batch) == (1.0, 10)


def test_a_delta_that_protects_nobody_is_refused():
    with pytest.raises(UsageError, match="Give less than 1 in 100"):
        Plan.of(Privacy(epsilon=3.0, delta=0.02), Train(), rows=100, steps=1, rounds=1)


def test_the_norm_of_the_noise_by_hand_and_as_it_falls():
    plan = Plan(clip=2.0, epsilon=8.0, delta=1e-4, rows=100, batch=8, steps=1, rounds=1, noise=0.5)
    assert plan.norms(64) == 0.5 * 8 / 8
    zeros = torch.zeros(10_000)
    fallen = noisy_mean(zeros, bound=plan.clip, noise=plan.noise, expected=plan.batch, randomness=Randomness(0))
    assert float(fallen.norm()) / plan.clip == pytest.approx(plan.norms(10_000), rel=0.03)
