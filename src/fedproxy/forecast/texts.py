"""A client's rows as the model would see them: how long they are, what is cut, and one of them in full."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedproxy.config import Train
from fedproxy.models.checkpoints import Tokenizer
from fedproxy.models.encoding import Encoded, training_examples


@dataclass(frozen=True)
class Texts:
    """What the rows of a client are, in tokens.

    Attributes:
        rows: How many there are.
        lost: Those that `max_length` leaves no token to learn.
        cut: Those that it cuts, among them the lost.
        longest: Tokens of the longest, as it is trained on.
        prompt: Mean and maximum of the tokens that do not count in the loss, before any is cut.
        answer: Mean and maximum of those that do.
        example: Prompt and answer of the first row, decoded from its tokens.
    """

    rows: int
    lost: int
    cut: int
    longest: int
    prompt: dict[str, float]
    answer: dict[str, float]
    example: dict[str, str]


def texts_of(
    rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, train: Train, examples: Sequence[Encoded]
) -> Texts:
    """Describe a client's rows.

    Args:
        rows: The rows.
        tokenizer: The LLM's.
        train: The [train] table.
        examples: The rows as they are trained on.

    Raises:
        ArtifactError, UsageError: as of `training_examples`.
    """
    whole = training_examples(rows, tokenizer, train, sys.maxsize)
    first = examples[0]
    prompt, answer = (
        str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        for ids in (first.ids[: first.start], first.ids[first.start :])
    )
    return Texts(
        rows=len(rows),
        lost=len(rows) - len(examples),
        cut=sum(len(example.ids) > train.max_length for example in whole),
        longest=max(len(example.ids) for example in examples),
        prompt=_spread([len(example.ids) - example.counting for example in whole]),
        answer=_spread([example.counting for example in whole]),
        example={"prompt": prompt, "answer": answer},
    )


def _spread(counts: Sequence[int]) -> dict[str, float]:
    return {"mean": sum(counts) / len(counts), "max": max(counts)}
