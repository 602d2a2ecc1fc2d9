"""Local training: LoRA on a client's rows, in a loop on accelerate.

TRL's SFTTrainer reaches less than 90 % of a bare loop's throughput on a small model (`benchmarks/training_loop.py`), so
the loop is our own; it has what federated rounds need: a fresh optimizer every round, a penalty on the trained
parameters, and the same bits for the same seed.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, get_scheduler

from fedproxy.config import Train
from fedproxy.errors import ArtifactError, FedproxyError, UsageError
from fedproxy.models.lora import AdaptedModel, adapter_parameters
from fedproxy.seeds import derive_seed

Penalty = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
IGNORED = -100
EAGER_ATTENTION_UP_TO = 256


@dataclass(frozen=True)
class Encoded:
    """One training example: token ids, and the position of the first one that counts in the loss."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Training:
    """What a local training did.

    Attributes:
        losses: Loss of every optimizer step (nats per token that counts, without the penalty).
        tokens: Tokens trained on, padding not counted.
        seconds: Wall time.
    """

    losses: list[float]
    tokens: int
    seconds: float

    @property
    def loss(self) -> float:
        """Mean loss over the steps."""
        return sum(self.losses) / len(self.losses)


def _pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, completion_only: bool) -> tuple[str, str, bool]:
    """A row as (prompt, completion, whether the tokenizer may add its special tokens)."""
    if "messages" in row:
        if tokenizer.chat_template is None:
            raise UsageError("The rows hold messages, but the model's tokenizer has no chat template.")
        messages = row["messages"]
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        if not whole.startswith(prompt):
            raise UsageError("The tokenizer's chat template does not repeat the prompt before the last answer.")
        pair = (prompt, whole[len(prompt) :], False)
    elif "text" in row:
        pair = ("", row["text"], True)
    else:
        pair = (row["prompt"], row["completion"], True)
    return pair if completion_only else ("", pair[0] + pair[1], pair[2])


def encode(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    completion_only: bool = True,
) -> list[Encoded]:
    """Encode rows in TRL's formats.

    Prompt and completion are encoded together, and the prompt alone tells where the completion begins; trailing
    spaces of the prompt belong to the completion. That is how the LM evaluation harness encodes what it scores, so
    that training tokens are scored tokens. The end-of-text token follows each completion. What is longer than
    `max_length` loses the beginning of its prompt (the harness truncates on the same side), then the end of its
    completion.

    Raises:
        UsageError: rows hold messages and the tokenizer has no usable chat template.
        ArtifactError: no row has a token to learn.
    """
    encoded = []
    for row in rows:
        prompt, completion, special = _pair(row, tokenizer, completion_only)
        spaces = len(prompt) - len(prompt.rstrip())
        if spaces:
            prompt, completion = prompt[:-spaces], prompt[-spaces:] + completion
        ids = list(tokenizer(prompt + completion, add_special_tokens=special)["input_ids"])
        start = len(tokenizer(prompt, add_special_tokens=special)["input_ids"]) if prompt else 0
        if special and tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids.append(tokenizer.eos_token_id)
        cut = max(0, min(start, len(ids) - max_length))
        ids, start = ids[cut:][:max_length], start - cut
        if len(ids) > max(start, 1):
            encoded.append(Encoded(ids, max(start, 1)))
    if not encoded:
        raise ArtifactError("No row has a token to learn. Check the rows, and max_length.")
    return encoded


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


def collate(examples: Sequence[Encoded], pad: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right: `input_ids`, `attention_mask`, `labels`, each [batch, longest]."""
    longest = max(len(e.ids) for e in examples)
    fill = [longest - len(e.ids) for e in examples]
    return {
        "input_ids": torch.tensor([e.ids + [pad] * n for e, n in zip(examples, fill, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(e.ids) + [0] * n for e, n in zip(examples, fill, strict=True)]),
        "labels": torch.tensor(
            [[IGNORED] * e.start + e.ids[e.start :] + [IGNORED] * n for e, n in zip(examples, fill, strict=True)]
        ),
    }


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def suit_attention(model: Any, longest: int, device: torch.device) -> str:
    """Choose the attention to train with: on a CPU, short sequences go without the fused one.

    There its backward pass costs more than the rest of the step.

    Args:
        model: The base model, changed.
        longest: Tokens of the longest sequence.
        device: Where it is trained.

    Returns:
        What the model had, for `set_attn_implementation` afterwards.
    """
    before: str = model.config._attn_implementation
    if device.type == "cpu" and before == "sdpa" and longest <= EAGER_ATTENTION_UP_TO:
        model.set_attn_implementation("eager")
    return before


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
    on_step: Callable[[int, int, float], None] | None = None,
) -> Training:
    """Train the adapter of `model` in place.

    The loss of a step is the mean over all tokens of its (accumulated) batch that count, plus the penalty once. The
    global random state (dropout) is seeded inside and put back afterwards.

    Args:
        model: A model with an adapter from `lora.attach`; only its adapter is trained.
        examples: The client's encoded rows.
        settings: The [train] table.
        pad: Padding token id.
        seed: Seed of batch order and dropout.
        steps: Optimizer steps; by default what `settings` ask for.
        penalty: Regulariser of the adapter's parameters (by adapter tensor name), e.g. Eq. 8-9.
        on_step: Called after each step with (step, steps, loss).

    Raises:
        FedproxyError: the loss is NaN or infinite.
    """
    accelerator = Accelerator()
    device = accelerator.device
    parameters = adapter_parameters(model)
    autocast = settings.precision == "bf16" or (settings.precision == "auto" and bf16_is_fast(device))
    total = steps or optimizer_steps(len(examples), settings)
    model.to(device).train()
    base: Any = model.get_base_model()
    if settings.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    attention = suit_attention(base, max(len(e.ids) for e in examples), device)
    optimizer = torch.optim.AdamW(
        list(parameters.values()),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    schedule = get_scheduler(settings.lr_scheduler_type, optimizer, settings.warmup_steps, total)
    generator = torch.Generator().manual_seed(derive_seed(seed, "batches"))
    losses: list[float] = []
    tokens = 0
    started = time.perf_counter()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, "dropout"))
            queue: list[list[int]] = []
            while len(losses) < total:
                micro: list[dict[str, torch.Tensor]] = []
                for _ in range(settings.gradient_accumulation_steps):
                    if not queue:
                        if micro:
                            break
                        queue = batches(
                            examples,
                            settings.batch_size,
                            group_by_length=settings.group_by_length,
                            generator=generator,
                        )
                    micro.append(collate([examples[i] for i in queue.pop()], pad))
                count = sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in micro)
                loss = 0.0
                for batch in micro:
                    tokens += int(batch["attention_mask"].sum())
                    labels = batch.pop("labels")[:, 1:].to(device)
                    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                        logits = model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False).logits
                    learned = labels != IGNORED
                    part = F.cross_entropy(logits[:, :-1][learned].float(), labels[learned], reduction="sum") / count
                    loss += part.item()
                    accelerator.backward(part)
                if not math.isfinite(loss):
                    raise FedproxyError(
                        f"The loss became {loss} at step {len(losses) + 1} of {total}. Lower learning_rate, or try "
                        'precision = "fp32".'
                    )
                if penalty is not None:
                    accelerator.backward(penalty(parameters))
                accelerator.clip_grad_norm_(list(parameters.values()), settings.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss)
                if on_step is not None:
                    on_step(len(losses), total, loss)
    finally:
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)
        if settings.gradient_checkpointing:
            base.activation_checkpointing_disable()
        model.eval()
    return Training(losses, tokens, time.perf_counter() - started)
