"""What orders and answers say of secure sums, as heads and tensors of messages; see `protocol`."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch

from fedproxy.config import CLIENT_NAME, Rule, read_table, table
from fedproxy.errors import ArtifactError
from fedproxy.federation.messages import WORDS, Ask, Step
from fedproxy.tensors import Tensors

MOST_MEMBERS = 255
"""Clients of a sum at most: each has a letter for each other one."""
LETTER_BYTES = 64 << 10
"""Of a letter at most so much is read."""
LETTER, COUNTS = "letter/", "counts/"

_Label = Annotated[str, Rule("a short word", lambda value: len(value) <= 20 and (not value or value.isidentifier()))]
_Number = Annotated[float, Rule("of at most 2^53", lambda value: abs(value) <= 1 << 53)]


@table
class AskHead:
    """The fields of `Ask` that are no tensors."""

    step: Step
    attempt: Annotated[int, Rule("0 or more", lambda value: 0 <= value < 1 << 31)]
    label: _Label
    threshold: Annotated[int, Rule(f"0 to {MOST_MEMBERS}", lambda value: 0 <= value <= MOST_MEMBERS)]
    top: _Number
    usual: _Number


@table
class ToldHead:
    """The head of `Told`."""

    client: Annotated[str, Rule("a client's name", lambda value: CLIENT_NAME.fullmatch(value) is not None)]
    round: Annotated[int, Rule("1 or more, below 2^53", lambda value: 0 < value < 1 << 53)]
    step: Step
    label: _Label
    numbers: Annotated[
        dict[Literal["rows", "agreement"], float],
        Rule("of at most 2^53", lambda value: all(abs(number) < 1 << 53 for number in value.values())),
    ]


def ask_parts(ask: Ask) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """The head and the tensors of what an order asks."""
    head = {field.name: getattr(ask, field.name) for field in dataclasses.fields(AskHead)}
    counts = {} if ask.counts is None else {COUNTS + WORDS: ask.counts}
    return head, {**letter_tensors(ask.letters), **counts}


def read_ask(head: Mapping[str, Any], tensors: Tensors, who: str) -> Ask:
    """The reverse of `ask_parts`.

    Raises:
        ArtifactError: a field is missing, unknown or impossible, or a tensor is no letter and no sum.
    """
    problems: list[str] = []
    fields: object = read_table(AskHead, dict(head), "ask", problems)
    if problems:
        raise ArtifactError(f"{who}: {problems[0]:.200}")
    counts = {name.removeprefix(COUNTS): tensor for name, tensor in tensors.items() if name.startswith(COUNTS)}
    check_words(counts, who)
    return Ask(**vars(fields), letters=letters_of(tensors, who), counts=counts.get(WORDS))


def letter_tensors(letters: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """Letters as tensors of bytes."""
    return {LETTER + name: torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for name, data in letters.items()}


def letters_of(tensors: Tensors, who: str) -> dict[str, bytes]:
    """The letters among the tensors of a message.

    Raises:
        ArtifactError: one is too long, or no bytes, or there are too many.
    """
    found = {name.removeprefix(LETTER): tensor for name, tensor in tensors.items() if name.startswith(LETTER)}
    for name, tensor in found.items():
        if not CLIENT_NAME.fullmatch(name):
            raise ArtifactError(f"{who}: {name[:64]!r} is no client's name.")
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > LETTER_BYTES:
            raise ArtifactError(f"{who}: the letter of {name[:64]!r} is no {LETTER_BYTES} bytes at most.")
    if len(found) > MOST_MEMBERS:
        raise ArtifactError(f"{who}: it holds {len(found)} letters, {MOST_MEMBERS} are read at most.")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def letters_size(count: int) -> dict[str, tuple[torch.dtype, int]]:
    """The tensors of so many letters under names of full length, for limits of bytes."""
    return {f"{LETTER}{number:064d}": (torch.uint8, LETTER_BYTES) for number in range(count)}


def check_words(words: Tensors, who: str) -> None:
    """Check that tensors are masked words, or none.

    Raises:
        ArtifactError: they are something else.
    """
    if any(name != WORDS or tensor.dtype != torch.uint32 or tensor.dim() != 1 for name, tensor in words.items()):
        raise ArtifactError(f"{who}: {', '.join(sorted(words))[:100]} are no masked words.")
