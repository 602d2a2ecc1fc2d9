"""The game of the one-run audit: with the noise on nobody beats the budget, with it off everybody does."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from fedproxy.config import Privacy, Train
from fedproxy.models.encoding import Encoded
from fedproxy.models.label_loss import row_means
from fedproxy.models.layouts import collate
from fedproxy.models.lora import attach
from fedproxy.models.private_training import Private
from fedproxy.models.training import train
from fedproxy.privacy.plan import Plan
from fedproxy.privacy.randomness import Randomness
from tests.conftest import make_model
from tests.privacy.one_run import chance, least_epsilon

CANARIES, GUESSES, STEPS = 120, 60, 80
EPSILON, DELTA = 0.5, 1e-4


def test_the_bound_is_that_of_the_paper():
    """Theorem 5.2 in pure form, where δ is 0, is a binomial tail; all of 20 right at ε = 0 is a chance of 2^-20."""
    assert chance(20, 20, 20, 0.0, 0.0) == pytest.approx(2.0**-20)
    assert chance(100, 50, 40, 1.0, 0.0) == pytest.approx(binom.sf(39, 50, math.e / (1 + math.e)))
    assert chance(100, 50, 40, 1.0, 1e-3) > chance(100, 50, 40, 1.0, 0.0)
    assert least_epsilon(100, 100, 100, 0.0) == pytest.approx(math.log(0.05**0.01 / (1 - 0.05**0.01)), abs=1e-3)
    assert least_epsilon(100, 100, 50, 1e-5) == 0


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_guesses_of_randomised_response_do_not_beat_its_epsilon(epsilon):
    """Its answers are right at the very rate that ε allows, so that the bound is beaten once in twenty games."""
    drawn = np.random.default_rng(0)
    right = drawn.binomial(1000, 1 / (1 + math.exp(-epsilon)), size=40)
    beaten = sum(least_epsilon(1000, 1000, int(one), 0.0) > epsilon for one in right)
    assert beaten <= 6
    assert np.median([least_epsilon(1000, 1000, int(one), 0.0) for one in right]) > 0.6 * epsilon


def canaries():
    """Rows of random tokens: nothing but having seen them foretells their ends."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(256, (CANARIES, 8), generator=generator)
    return [Encoded(row.tolist(), 4) for row in drawn]


def losses(model, rows):
    with torch.no_grad():
        return np.array([row_means(model, collate([row], 256)).item() for row in rows])


def audited(noise_on):
    """One training, and what its auditor finds: ε at least, and how many of the guesses were right."""
    rows, coins = canaries(), np.random.default_rng(1).random(CANARIES) < 0.5
    taken = [row for row, coin in zip(rows, coins, strict=True) if coin]
    settings = Train(
        batch_size=64, max_steps=STEPS, epochs=1e6, learning_rate=1e-2, lora_dropout=0.0, precision="fp32",
        padding_free=False,
    )  # fmt: skip
    plan = Plan.of(
        Privacy(epsilon=EPSILON, delta=DELTA), replace(settings, batch_size=30), rows=CANARIES // 2, steps=STEPS,
        rounds=1,
    )  # fmt: skip
    assert plan.spent(1) <= EPSILON
    model = attach(make_model(num_hidden_layers=2), r=16, alpha=32, dropout=0.0, seed=0)
    before = losses(model, rows)
    private = Private(plan if noise_on else replace(plan, noise=0.0), Randomness(0))
    train(model, taken, settings, pad=256, seed=0, private=private)
    order = np.argsort(losses(model, rows) - before)
    half = GUESSES // 2
    right = int(coins[order[:half]].sum() + (~coins[order[-half:]]).sum())
    return least_epsilon(CANARIES, GUESSES, right, DELTA), right


@pytest.mark.slow
def test_with_the_noise_on_the_auditor_does_not_beat_the_budget():
    found, right = audited(noise_on=True)
    assert found <= EPSILON, right


@pytest.mark.slow
def test_with_the_noise_off_the_auditor_beats_it():
    """Or the game above would prove nothing."""
    found, right = audited(noise_on=False)
    assert found > 2 * EPSILON, right
