"""Rows that are never trained on: the loss on what training would count and, of few answers, the accuracy."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from fedproxy.config import Train
from fedproxy.errors import FedproxyError
from fedproxy.metrics import HIGHEST_LOSS
from fedproxy.models.answer_likelihoods import Request, keeps_cache, log_likelihoods
from fedproxy.models.checkpoints import Tokenizer
from fedproxy.models.encoding import Encoded, encode_pairs, training_examples
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
        examples: Those with a token that counts in the loss within their most tokens.
        questions: A row each, empty where the rows have no labels.
    """

    rows: int
    examples: Sequence[Encoded]
    questions: Sequence[Question]

    @property
    def tokens(self) -> int:
        """Tokens that `measure` reads, padding not counted: each example, and each context once for all its answers.

        The last token of a context begins each answer, of which the last is not read. A model that keeps no cache reads
        more: each context anew for every answer.
        """
        begun: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for context, answer in (request for question in self.questions for request in question.requests):
            begun.setdefault(tuple(context), set()).add(tuple(answer[:-1]))
        read = sum(len(context) - 1 + sum(1 + len(one) for one in answers) for context, answers in begun.items())
        return read + sum(len(example.ids) for example in self.examples)


class BrokenModelError(FedproxyError):
    """A loss on the validation rows that is no number, or too high to mean anything."""


def labels_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The different answers of a client's rows, sorted; none if they are no labels.

    Answers are labels if there are 2 to `MOST_LABELS` of them, and at most half as many as rows.
    """
    answers = {answer_of(row) for row in rows}
    if "" in answers or not 2 <= len(answers) <= min(MOST_LABELS, len(rows) // 2):
        return []
    return sorted(answers)


def answer_of(row: Mapping[str, Any]) -> str:
    """What a row answers; "" for plain text, and for a message that only calls tools."""
    return str(row["messages"][-1].get("content") or "") if "messages" in row else str(row.get("completion", ""))


def encode_validation(
    rows: Sequence[Mapping[str, Any]], labels: Sequence[str], tokenizer: Tokenizer, train: Train, longest: int
) -> Validation:
    """Encode validation rows as training encodes its rows, and each row's options.

    Args:
        rows: At least one, in TRL's formats; options that a row brings take the place of the labels.
        labels: As of `labels_of`, of all the client's rows.
        tokenizer: The proxy's.
        train: The [train] table, which says what of a row counts in the loss.
        longest: Tokens of a row at most; what is longer is cut as in training.

    Raises:
        UsageError, ArtifactError: as of `encode`.
    """
    examples = training_examples(rows, tokenizer, train, longest)
    asked = [options for row in rows if (options := _options(row, labels)) is not None]
    questions = []
    if len(asked) == len(rows):
        flat = encode_pairs([row for rows_, _ in asked for row in rows_], tokenizer, max_length=longest)
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
    return rows, frozenset({labels.index(answer)} if (answer := answer_of(row)) in labels else ())


@torch.no_grad()
def measure(
    model: AdaptedModel,
    validation: Validation,
    *,
    pad: int,
    batch_size: int,
    on_read: Callable[[int, int], None] = lambda read, texts: None,
) -> tuple[float, float | None]:
    """Loss and accuracy of a model on validation rows, without autocast; the model is in evaluation state afterwards.

    The loss is the mean over all tokens that count in training, the end of text among them. The accuracy is the
    share of rows of which a right answer has the highest summed log probability (the first of equals), as the LM
    evaluation harness computes "acc".

    Args:
        model: The proxy with an adapter.
        validation: The rows.
        pad: Padding token id.
        batch_size: Rows in a forward pass.
        on_read: Called after each forward pass with how many texts were read, and how many there are: every example,
            and every answer that is compared.

    Returns:
        The loss in nats per token, and the accuracy; none where the rows have no labels.

    Raises:
        BrokenModelError: the loss is no number, or above `HIGHEST_LOSS`.
    """
    device = Accelerator().device
    model.to(device)
    model.eval()
    ordered = sorted(validation.examples, key=lambda example: -len(example.ids))
    requests = [request for question in validation.questions for request in question.requests]
    texts, sums = len(ordered) + len(requests), list[float]()
    for begin in range(0, len(ordered), batch_size):
        batch = collate(ordered[begin : begin + batch_size], pad)
        sums.append(float(summed_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})))
        on_read(begin + len(batch["labels"]), texts)
    loss = sum(sums) / sum(example.counting for example in ordered)
    if not (math.isfinite(loss) and loss <= HIGHEST_LOSS):
        raise BrokenModelError(f"The loss on the validation rows is {loss:.4g}. Lower learning_rate.")
    if not requests:
        return loss, None
    read = itertools.count(len(ordered) + 1)
    totals = _totals(model, requests, batch_size, lambda: on_read(next(read), texts))
    return loss, _accuracy(validation.questions, totals)


def _totals(
    model: AdaptedModel, requests: Sequence[Request], batch_size: int, on_answer: Callable[[], None]
) -> list[float]:
    """The summed log probability of each answer."""
    shared = len({tuple(context) for context, _ in requests}) < len(requests) and keeps_cache(model)
    found = log_likelihoods(
        model, requests, batch_size=batch_size, shared=shared, on_answer=lambda number, answer: on_answer()
    )
    return [total for total, _ in found]


def _accuracy(questions: Sequence[Question], totals: Sequence[float]) -> float:
    """The share of questions of which a right answer has the highest total, the first of equals."""
    after, right = iter(totals), 0
    for question in questions:
        found = [next(after) for _ in question.requests]
        right += found.index(max(found)) in question.right
    return right / len(questions)
