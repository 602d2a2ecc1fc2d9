"""Rows that are never trained on: the loss on their completions and, where the answers are few, the accuracy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from fedproxy.errors import FedproxyError
from fedproxy.metrics import HIGHEST_LOSS
from fedproxy.models.answer_likelihoods import Request, keeps_cache, log_likelihoods
from fedproxy.models.checkpoints import Tokenizer
from fedproxy.models.encoding import Encoded, encode, encode_pairs
from fedproxy.models.label_loss import summed_loss
from fedproxy.models.layouts import collate
from fedproxy.models.lora import AdaptedModel

MOST_LABELS = 20
"""More different answers than these are no labels."""
OPTIONS = "options"
"""Field of a row that a task of the harness renders: its `Options`."""


@dataclass(frozen=True)
class Options:
    """The answers that a row chooses among.

    Attributes:
        pairs: Prompt and completion of each.
        right: The numbers of the right ones.
    """

    pairs: Sequence[tuple[str, str]]
    right: frozenset[int]


@dataclass(frozen=True)
class Question:
    """A row's options as token ids."""

    requests: Sequence[Request]
    right: frozenset[int]


@dataclass(frozen=True)
class Validation:
    """Encoded validation rows.

    Attributes:
        rows: Their number.
        examples: Those with a completion that `max_length` leaves something of.
        questions: A row each, empty where the rows have no labels.
    """

    rows: int
    examples: Sequence[Encoded]
    questions: Sequence[Question]


class BrokenModelError(FedproxyError):
    """A loss on the validation rows that is no number, or too high to mean anything."""


def labels_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The different answers of a client's rows, sorted; none if they are no labels.

    Answers are labels if there are 2 to `MOST_LABELS` of them, and at most half as many as rows.
    """
    answers = {_answer(row) for row in rows}
    if "" in answers or not 2 <= len(answers) <= min(MOST_LABELS, len(rows) // 2):
        return []
    return sorted(answers)


def _answer(row: Mapping[str, Any]) -> str:
    """What a row answers; "" for plain text, and for a message that only calls tools."""
    return str(row["messages"][-1].get("content") or "") if "messages" in row else str(row.get("completion", ""))


def encode_validation(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[str], tokenizer: Tokenizer, *, max_length: int
) -> Validation:
    """Encode validation rows as training encodes its rows, and each row's options.

    Args:
        rows: At least one, in TRL's formats; options that a row brings take the place of the labels.
        labels: As of `labels_of`, of all the client's rows.
        tokenizer: The proxy's.
        max_length: Tokens of a row at most; what is longer is cut as in training.

    Raises:
        UsageError, ArtifactError: as of `encode`.
    """
    examples = encode(rows, tokenizer, max_length=max_length)
    asked = [options for row in rows if (options := _options(row, labels)) is not None]
    questions = []
    if len(asked) == len(rows):
        flat = encode_pairs([row for rows_, _ in asked for row in rows_], tokenizer, max_length=max_length)
        requests = iter([(one.ids[: one.start], one.ids[one.start :]) for one in flat])
        questions = [Question([next(requests) for _ in rows_], right) for rows_, right in asked]
    return Validation(len(rows), examples, questions)


def _options(
    row: Mapping[str, Any], labels: Sequence[str]
) -> tuple[Sequence[Mapping[str, Any]], frozenset[int]] | None:
    """A row with each of its answers in turn, and the numbers of the right ones; none if it has no options."""
    own = row.get(OPTIONS)
    if isinstance(own, Options):
        return [{"prompt": prompt, "completion": completion} for prompt, completion in own.pairs], own.right
    if not labels:
        return None
    if "messages" in row:
        last = row["messages"][-1]
        rows = [{**row, "messages": [*row["messages"][:-1], {**last, "content": label}]} for label in labels]
    else:
        rows = [{**row, "completion": label} for label in labels]
    return rows, frozenset({labels.index(answer)} if (answer := _answer(row)) in labels else ())


@torch.no_grad()
def measure(model: AdaptedModel, validation: Validation, *, pad: int, batch_size: int) -> tuple[float, float | None]:
    """Loss and accuracy of a model on validation rows, without autocast; the model is in evaluation state afterwards.

    The loss is the mean over all tokens of the completions, the end of text among them. The accuracy is the share of
    rows of which a right answer has the highest summed log probability (the first of equals), as the LM evaluation
    harness computes "acc".

    Args:
        model: The proxy with an adapter.
        validation: The rows.
        pad: Padding token id.
        batch_size: Rows in a forward pass.

    Returns:
        The loss in nats per token, and the accuracy; none where the rows have no labels.

    Raises:
        BrokenModelError: the loss is no number, or above `HIGHEST_LOSS`.
    """
    device = Accelerator().device
    model.to(device)
    model.eval()
    ordered = sorted(validation.examples, key=lambda example: -len(example.ids))
    sums = []
    for begin in range(0, len(ordered), batch_size):
        batch = collate(ordered[begin : begin + batch_size], pad)
        sums.append(float(summed_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})))
    loss = sum(sums) / sum(example.counting for example in ordered)
    if not (math.isfinite(loss) and loss <= HIGHEST_LOSS):
        raise BrokenModelError(f"The loss on the validation rows is {loss:.4g}. Lower learning_rate.")
    return loss, _accuracy(model, validation.questions, batch_size) if validation.questions else None


def _accuracy(model: AdaptedModel, questions: Sequence[Question], batch_size: int) -> float:
    requests = [request for question in questions for request in question.requests]
    shared = len({tuple(context) for context, _ in requests}) < len(requests) and keeps_cache(model)
    totals = iter(total for total, _ in log_likelihoods(model, requests, batch_size=batch_size, shared=shared))
    right = 0
    for question in questions:
        found = [next(totals) for _ in question.requests]
        right += found.index(max(found)) in question.right
    return right / len(questions)
