"""What a private training does: how rows are drawn and clipped, how much noise covers them, and what it costs.

The mechanism is DP-SGD. In each step every row takes part with the same probability, its gradient is clipped, and the
sum of the clipped gradients gets Gaussian noise before it is divided by the number of rows that are expected.

Reference:
    Abadi et al., "Deep Learning with Differential Privacy", CCS 2016 (arXiv 1607.00133), Algorithm 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedproxy.config import Privacy, Train
from fedproxy.errors import UsageError
from fedproxy.privacy.accounting import Steps, default_delta, epsilon_of, noise_for
from fedproxy.privacy.randomness import Randomness

_MARGIN = 1 - 1e-5
"""Clipped gradients stay below the bound by so much more than float32 rounds."""


@dataclass(frozen=True)
class Plan:
    """The private trainings of one client in one run, all alike.

    Attributes:
        clip: Largest norm that a row's gradient counts with.
        epsilon: The budget of all rounds.
        delta: Its δ.
        rows: The client's training rows.
        batch: Rows that a step draws in the mean; all rows at most.
        steps: Optimizer steps of a round.
        rounds: Rounds that were announced.
        noise: Standard deviation of the noise on the sum, in units of `clip`.
    """

    clip: float
    epsilon: float
    delta: float
    rows: int
    batch: int
    steps: int
    rounds: int
    noise: float

    @staticmethod
    def of(privacy: Privacy, train: Train, *, rows: int, steps: int, rounds: int) -> "Plan":
        """The plan of a client with so many rows.

        Args:
            privacy: The budget.
            train: The [train] table.
            rows: The client's training rows.
            steps: Optimizer steps that a round takes with them.
            rounds: Rounds that are announced.

        Raises:
            UsageError: δ is so large that the budget protects nobody, or no noise suffices.
            MissingExtraError: `dp-accounting` is not installed.
        """
        delta = default_delta(rows) if privacy.delta is None else privacy.delta
        if delta * rows >= 1:
            raise UsageError(
                f"[train.privacy] delta = {delta:g}: of {rows} rows one could be told outright. Give less than 1 in "
                f"{rows}, or leave it out for {default_delta(rows):.2g}."
            )
        batch = min(train.batch_size * train.gradient_accumulation_steps, rows)
        noise = noise_for(privacy.epsilon, delta, batch / rows, steps * rounds)
        return Plan(privacy.clip, privacy.epsilon, delta, rows, batch, steps, rounds, noise)

    @property
    def sampling(self) -> float:
        """Probability with which a row takes part in a step."""
        return self.batch / self.rows

    def cost(self, trainings: int) -> Steps:
        """What so many trainings cost, to be accounted for."""
        return Steps(self.sampling, self.noise, self.steps * trainings)

    def spent(self, trainings: int) -> float:
        """The ε at δ that so many trainings cost."""
        return epsilon_of([self.cost(trainings)], self.delta)

    def norms(self, parameters: int) -> float:
        """The expected norm of the noise in a step's mean gradient, in norms of `clip`: see `norm_of_noise`.

        Args:
            parameters: The trained values.
        """
        return norm_of_noise(self.noise, parameters, self.batch)

    def as_dict(self, parameters: int) -> dict[str, Any]:
        """What a dry run tells of it, for so many trained values."""
        return {
            "noise": self.noise,
            "norms": self.norms(parameters),
            "epsilon": self.spent(self.rounds),
            "delta": self.delta,
            "batch": self.batch,
        }


def norm_of_noise(noise: float, parameters: int, count: int) -> float:
    """The expected norm of the noise in a mean of clipped vectors, in norms of the clip: σ √P / n.

    The mean of the vectors themselves has 1 at most.

    Args:
        noise: σ, the standard deviation on the sum, in norms of the clip.
        parameters: P, values of a vector.
        count: n, vectors in the mean.
    """
    return noise * math.sqrt(parameters) / count


def clipped_sum(gradients: Mapping[str, torch.Tensor], bound: float) -> dict[str, torch.Tensor]:
    """Sum the gradients of several rows, each clipped to `bound`.

    A row whose gradient has a value that is NaN or infinite counts as zero: it must not decide what others see.

    Args:
        gradients: By parameter name, float32 [rows, *shape of the parameter].
        bound: Largest Euclidean norm of a row's gradient, over all parameters together.

    Returns:
        The sum by parameter name; it changes by `bound` at most when a row comes or goes.
    """
    squares = sum(gradient.flatten(1).double().square().sum(1) for gradient in gradients.values())
    assert isinstance(squares, torch.Tensor)
    norms = squares.sqrt()
    sound = norms.isfinite()
    factors = (_MARGIN * bound / norms[sound]).clamp(max=1.0).float()
    return {name: torch.tensordot(factors, gradient[sound], dims=1) for name, gradient in gradients.items()}


def noisy_mean(
    total: torch.Tensor, *, bound: float, noise: float, expected: int, randomness: Randomness
) -> torch.Tensor:
    """Add the noise to a sum of clipped gradients, and divide by the expected number of rows.

    Args:
        total: The sum, float32.
        bound: What each row was clipped to.
        noise: Standard deviation of the noise, in units of `bound`.
        expected: Rows that a step draws in the mean, whatever this one drew.
        randomness: Where the noise comes from.
    """
    drawn = randomness.normal(total.numel()).view(total.shape).to(total.device)
    return ((total.double() + noise * bound * drawn) / expected).to(total.dtype)
