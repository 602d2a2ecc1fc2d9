"""The steps of a training with differential privacy, in the place of the plain ones."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedproxy.models.encoding import Encoded
from fedproxy.models.gradients import Backward
from fedproxy.models.lora import AdaptedModel, adapter_parameters
from fedproxy.models.row_gradients import check_rows_apart, rows_apart
from fedproxy.privacy.plan import Plan, clipped_sum, noisy_mean
from fedproxy.privacy.randomness import Randomness


@dataclass(frozen=True)
class Private:
    """That a training is private, and how.

    Attributes:
        plan: Clipping, sampling and noise.
        randomness: Where all of its randomness comes from; only a test gives one with a seed.
    """

    plan: Plan
    randomness: Randomness = field(default_factory=Randomness)

    def step_batches(self, examples: Sequence[Encoded], size: int) -> Iterator[list[list[Encoded]]]:
        """Yield the batches of each step, without end: every row by chance, `size` rows at most in one forward pass.

        A step that draws no row has no batches.
        """
        while True:
            drawn = self.randomness.chosen(len(examples), self.plan.sampling)
            drawn.sort(key=lambda number: -len(examples[number].ids))
            yield [[examples[i] for i in drawn[begin : begin + size]] for begin in range(0, len(drawn), size)]

    @contextlib.contextmanager
    def backward(self, model: AdaptedModel, alone: Backward) -> Iterator[Backward]:
        """Turn the backward pass of the sum of the rows' mean losses into the private one.

        Its gradients are the noisy mean of the rows' clipped gradients, its loss the mean over the rows that were
        drawn; of none the last one again.

        Args:
            model: The model, ready for training.
            alone: From `in_training`, with the loss `row_means`.

        Raises:
            UsageError: the model does not keep the rows of a batch apart.
        """
        last = 0.0
        with rows_apart(model) as found:
            parameters = {name: adapter_parameters(model)[name] for name in check_rows_apart(model, found)}

            def backward(batches: Sequence[Sequence[Encoded]], count: int) -> float:
                nonlocal last
                total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
                losses = 0.0
                for batch in batches:
                    found.rows = len(batch)
                    losses += alone([batch], 1)
                    gradients = found.take()
                    rows = {name: gradients[name] for name in parameters if name in gradients}
                    for name, part in clipped_sum(rows, self.plan.clip).items():
                        total[name] += part
                self._noise(parameters, total)
                drawn = sum(map(len, batches))
                last = losses / drawn if drawn else last
                return last

            yield backward

    def _noise(self, parameters: Mapping[str, torch.nn.Parameter], total: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.grad = noisy_mean(
                total[name],
                bound=self.plan.clip,
                noise=self.plan.noise,
                expected=self.plan.batch,
                randomness=self.randomness,
            )


def sound(model: AdaptedModel) -> bool:
    """Whether every value of the adapter is a number; it follows from what is private already, as no loss does."""
    return all(math.isfinite(float(parameter.detach().sum())) for parameter in adapter_parameters(model).values())
