"""[federate.privacy]: noise in the sum of the updates, so that all rounds tell little of any one client.

Two federations are neighbours if in one of them a client's updates are all zero. Each update is clipped to a norm, so
the sum of a round differs by at most that norm, and Gaussian noise of z such norms is added to it. Everybody counts
with the same weight. The number of updates is told. Which clients a round asks follows from the experiment's seed, so
nothing is gained by asking a part: a client is reckoned to be in every round.

Without secure sums the server adds the noise, and is trusted to. With them each client adds its part of the variance,
one t-th where a sum needs t clients: whatever sum is opened has all of the noise.

Reference: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018 (arXiv 1710.06963).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedproxy.config import Federate
from fedproxy.errors import UsageError
from fedproxy.privacy.accounting import Steps, epsilon_of, noise_for, require_accounting
from fedproxy.privacy.randomness import Randomness

REACH = 8.0
"""Noise beyond so many standard deviations does not occur: one value in 10^15."""


def check_delta(federate: Federate, clients: int) -> None:
    """Check that the δ of a [federate] table, if it has one, protects so many clients.

    Raises:
        UsageError: one of them could be told outright.
    """
    if federate.privacy is not None and federate.privacy.delta * clients >= 1:
        raise UsageError(
            f"[federate.privacy] delta = {federate.privacy.delta:g}: of {clients} clients one could be told outright. "
            f"Give less than 1 in {clients}."
        )


@dataclass(frozen=True)
class ClientNoise:
    """The noise of a federation.

    Attributes:
        clip: Largest norm of an update.
        multiplier: z, the noise in norms of `clip`.
        delta: Probability that the budget does not bind.
    """

    clip: float
    multiplier: float
    delta: float

    @staticmethod
    def of(federate: Federate) -> "ClientNoise | None":
        """The noise of a [federate] table; none without a budget.

        Raises:
            MissingExtraError: `dp-accounting` is not installed.
            UsageError: so small an ε cannot be had.
        """
        if federate.privacy is None:
            return None
        budget = federate.privacy
        require_accounting("[federate.privacy]")
        try:
            z = noise_for(budget.epsilon, budget.delta, sampling=1.0, count=federate.rounds)
        except UsageError as error:
            raise UsageError(f"[federate.privacy] {error}") from error
        return ClientNoise(budget.clip, z, budget.delta)

    def spent(self, rounds: int) -> float:
        """The ε that so many rounds cost."""
        return epsilon_of([Steps(1.0, self.multiplier, rounds)], self.delta)

    def deviation(self, parts: int = 1) -> float:
        """Standard deviation of each coordinate's noise, of one of so many parts that make the whole together."""
        return self.multiplier * self.clip / math.sqrt(parts)

    def added(self, merged: Mapping[str, torch.Tensor], clients: int) -> dict[str, torch.Tensor]:
        """The mean of so many clients' updates with the noise of their sum.

        Args:
            merged: The mean.
            clients: n.
        """
        draws, scale = Randomness(), self.deviation() / clients
        return {
            name: tensor + (draws.normal(tensor.numel()) * scale).to(tensor.dtype).reshape(tensor.shape)
            for name, tensor in merged.items()
        }
