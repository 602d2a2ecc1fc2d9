"""Local training: LoRA on a client's rows, in a loop on accelerate.

Transformers' Trainer takes several times as long on rows of mixed lengths (`benchmarks/training_loop.py`), so the loop
is our own; it has what federated rounds need: a fresh optimizer every round, a penalty on the trained parameters, a
drift, and the same bits for the same seed.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from transformers import get_scheduler

from fedproxy.config import Train
from fedproxy.errors import FedproxyError, UsageError
from fedproxy.memory import peak_memory, restart_peak
from fedproxy.models.encoding import Encoded
from fedproxy.models.gradients import in_training
from fedproxy.models.label_loss import row_means, summed_loss
from fedproxy.models.lora import AdaptedModel, adapter_parameters
from fedproxy.models.parallel import together
from fedproxy.models.private_training import Private, sound
from fedproxy.seeds import derive_seed

_WARMED = {"constant": "constant_with_warmup"}
"""Transformers' schedules that overlook warmup_steps, and those that do not and are else the same."""
Penalty = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


class DivergedError(FedproxyError):
    """A loss that became NaN or infinite: of a client it costs its reply, of whoever trains alone it ends the run."""


@dataclass(frozen=True)
class Training:
    """What a local training did.

    Attributes:
        losses: Loss of every optimizer step (nats per token that counts, without the penalty).
        tokens: Tokens trained on, padding not counted.
        seconds: Wall time.
        peak_memory: Most bytes in use at once: of the GPU's memory, or on a CPU of the process's.
        rate_sum: Sum of the steps' learning rates.
    """

    losses: list[float]
    tokens: int
    seconds: float
    peak_memory: int
    rate_sum: float

    @property
    def loss(self) -> float:
        """Mean loss over the steps."""
        return sum(self.losses) / len(self.losses)


def batches(
    examples: Sequence[Encoded], size: int, *, group_by_length: bool, generator: torch.Generator
) -> list[list[int]]:
    """Cut the examples into shuffled batches; with `group_by_length`, of similar lengths each."""
    order: list[int] = torch.randperm(len(examples), generator=generator).tolist()
    if group_by_length:
        pool = size * 50
        order = [
            index
            for begin in range(0, len(order), pool)
            for index in sorted(order[begin : begin + pool], key=lambda i: -len(examples[i].ids))
        ]
    cut = [order[begin : begin + size] for begin in range(0, len(order), size)]
    return [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]


def optimizer_steps(examples: int, settings: Train) -> int:
    """How many optimizer steps `settings` ask for on so many examples."""
    a_epoch = math.ceil(examples / (settings.batch_size * settings.gradient_accumulation_steps))
    steps = max(1, round(settings.epochs * a_epoch))
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def train(
    model: AdaptedModel,
    examples: Sequence[Encoded],
    settings: Train,
    *,
    pad: int,
    seed: int,
    steps: int | None = None,
    penalty: Penalty | None = None,
    drift: Mapping[str, torch.Tensor] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    private: Private | None = None,
) -> Training:
    """Train the adapter of `model` in place.

    The loss of a step is the mean over all tokens of its (accumulated) batch that count, plus the penalty once. The
    global random state (dropout) is seeded inside and put back afterwards. A private training has steps of its own
    (`Private`), computes in one process, and draws dropout, too, as nobody can foretell: or a row would move the
    others' gradients by what it does to theirs.

    Args:
        model: A model with an adapter from `lora.attach`; only those tensors of it are trained that require gradients.
        examples: The client's encoded rows.
        settings: The [train] table.
        pad: Padding token id.
        seed: Seed of batch order and dropout.
        steps: Optimizer steps; by default what `settings` ask for.
        penalty: Regulariser of the trained parameters (by adapter tensor name), e.g. Eq. 8-9.
        drift: What a step with learning rate η takes away from each trained parameter, beside the optimizer's change:
            η times this (by adapter tensor name).
        on_step: Called after each step with (step, steps, loss).
        private: How the steps are made private, of a training with [train.privacy].

    Raises:
        DivergedError: the loss, or of a private training what was learned, is NaN or infinite.
        UsageError: as of `Private.backward`; or `settings` ask for privacy, and there is no `private`.
    """
    if settings.privacy is not None and private is None:
        raise UsageError("[train.privacy] holds for the rounds of a federation, and this is none. Leave it out here.")
    accelerator = Accelerator()
    device = accelerator.device
    parameters = {name: parameter for name, parameter in adapter_parameters(model).items() if parameter.requires_grad}
    trained: list[torch.Tensor] = list(parameters.values())
    total = steps or optimizer_steps(len(examples), settings)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        restart_peak()
    model.to(device)
    optimizer = torch.optim.AdamW(
        trained,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    optimizer.zero_grad()  # of a training that failed
    kind = settings.lr_scheduler_type
    schedule = get_scheduler(_WARMED.get(kind, kind), optimizer, settings.warmup_steps, total)
    drifts = None if drift is None else [drift[name].to(device) for name in parameters]
    losses: list[float] = []
    tokens, rate_sum = 0, 0.0
    started = time.perf_counter()
    if private is None:
        settings_of_step, loss_of, draws = settings, summed_loss, step_batches(examples, settings, seed)
    else:
        settings_of_step, loss_of = replace(settings, padding_free=False), row_means
        draws = private.step_batches(examples, settings.batch_size)
    with (
        torch.random.fork_rng(),
        in_training(model, settings_of_step, pad, loss_of) as alone,
        private.backward(model, alone) if private else together(model, settings, pad, seed, alone) as backward,
    ):
        torch.manual_seed(private.randomness.seed() if private else derive_seed(seed, "dropout"))
        for chosen in itertools.islice(draws, total):
            loss = backward(chosen, sum(example.counting for batch in chosen for example in batch))
            if private is None and not math.isfinite(loss):
                raise DivergedError(
                    f"The loss became {loss} at step {len(losses) + 1} of {total}. Lower learning_rate, or try "
                    'precision = "fp32".'
                )
            if penalty is not None:
                accelerator.backward(penalty(parameters))
            accelerator.clip_grad_norm_(trained, settings.max_grad_norm)
            rate = float(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if drifts is not None:
                with torch.no_grad():
                    torch._foreach_add_(trained, drifts, alpha=-rate)
            schedule.step()
            optimizer.zero_grad()
            tokens += sum(len(example.ids) for batch in chosen for example in batch)
            rate_sum += rate
            losses.append(loss)
            if on_step is not None:
                on_step(len(losses), total, loss)
    if private is not None and not sound(model):
        raise DivergedError("What was learned is no number any more. Lower learning_rate.")
    peak = torch.cuda.max_memory_allocated(device) if cuda else peak_memory()
    return Training(losses, tokens, time.perf_counter() - started, peak, rate_sum)


def step_batches(
    examples: Sequence[Encoded], settings: Train, seed: int, *, skip: int = 0
) -> Iterator[list[list[Encoded]]]:
    """Yield the batches of each optimizer step, without end: all examples once, shuffled, then all once again.

    What the first `skip` passes over all examples would give is passed over.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "batches"))
    for _ in range(skip):  # what `batches` draws
        torch.randperm(len(examples), generator=generator)
        torch.randperm(math.ceil(len(examples) / settings.batch_size), generator=generator)
    while True:
        order = batches(examples, settings.batch_size, group_by_length=settings.group_by_length, generator=generator)
        order.reverse()
        for begin in range(0, len(order), settings.gradient_accumulation_steps):
            together = order[begin : begin + settings.gradient_accumulation_steps]
            yield [[examples[i] for i in batch] for batch in together]


def trained_tokens(examples: Sequence[Encoded], settings: Train, seed: int, steps: int | None = None) -> int:
    """How many tokens `train` would train on, without training; arguments are as of `train`."""
    a_epoch = optimizer_steps(len(examples), replace(settings, epochs=1.0, max_steps=None))
    epochs, rest = divmod(steps or optimizer_steps(len(examples), settings), a_epoch)
    found = epochs * sum(len(example.ids) for example in examples)
    if rest:
        last = itertools.islice(step_batches(examples, settings, seed, skip=epochs), rest)
        found += sum(len(example.ids) for chosen in last for batch in chosen for example in batch)
    return found
