"""A client's rows as token ids, made once for all rounds."""

import functools
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedproxy.artifacts import read_json
from fedproxy.errors import ArtifactError, FedproxyError, UsageError
from fedproxy.models.tokens import answer_ids, text_ids

_log = logging.getLogger(__name__)

_AT_ONCE = 1000
"""Rows that the tokenizer is given together: fast ones share them out among the processors."""


@dataclass(frozen=True)
class Encoded:
    """One training example.

    Attributes:
        ids: Token ids; `encode` keeps them as 32-bit integers.
        start: Position of the first one that counts in the loss, at least 1.
        cut: Whether the row has more than these.
    """

    ids: Sequence[int]
    start: int
    cut: bool = False

    @property
    def counting(self) -> int:
        """How many of its tokens count in the loss."""
        return len(self.ids) - self.start


def _pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, completion_only: bool) -> tuple[str, str, bool]:
    """A row as (prompt, completion, whether the tokenizer may add its special tokens)."""
    if "messages" in row:
        if tokenizer.chat_template is None:
            raise UsageError("The rows hold messages, but the model's tokenizer has no chat template.")
        messages: list[dict[str, Any]] = row["messages"]
        settings: dict[str, Any] = {"tools": row.get("tools"), "tokenize": False}
        whole = str(tokenizer.apply_chat_template(messages, **settings))
        prompt = str(tokenizer.apply_chat_template(messages[:-1], **settings, add_generation_prompt=True))
        if not whole.startswith(prompt):
            raise UsageError("The tokenizer's chat template does not repeat the prompt before the last answer.")
        pair = (prompt, whole[len(prompt) :], False)
    elif "text" in row:
        pair = ("", row["text"], True)
    else:
        pair = (row["prompt"], row["completion"], True)
    prompt, completion, special = pair if completion_only else ("", pair[0] + pair[1], pair[2])
    bare = prompt.rstrip()
    return bare, prompt[len(bare) :] + completion, special


def _tokens(
    pairs: Sequence[tuple[str, str, bool]], tokenizer: PreTrainedTokenizerBase, special: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of each prompt with its completion, and those of the prompt alone."""
    whole = text_ids(tokenizer, [prompt + completion for prompt, completion, _ in pairs], special=special)
    begun = iter(text_ids(tokenizer, [prompt for prompt, _, _ in pairs if prompt], special=special))
    for ids, (prompt, completion, _) in zip(whole, pairs, strict=True):
        before = next(begun) if prompt else []
        yield ids if len(ids) > len(before) else before + answer_ids(tokenizer, ids, before, completion), before


def _tell_end(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> None:
    """Warn, once, of a chat template whose answers end in a token at which the model does not stop."""
    stops = {tokenizer.eos_token_id}
    settings = Path(tokenizer.name_or_path) / "generation_config.json"
    if settings.is_file():
        held = read_json(settings)
        given = held.get("eos_token_id") if isinstance(held, dict) else None
        stops |= {number for number in (given if isinstance(given, list) else [given]) if isinstance(number, int)}
    if stops.isdisjoint(answer):
        marks = [number for number in answer if number in tokenizer.added_tokens_decoder]
        turn = tokenizer.convert_ids_to_tokens(marks[-1]) if marks else "no token of its own"
        _warn_of_end(str(turn), str(tokenizer.eos_token))


@functools.cache
def _warn_of_end(turn: str, text: str) -> None:
    _log.warning(
        "The chat template ends an answer with %s, the tokenizer's end of text is %s: the tuned model will not stop "
        "after an answer. Set eos_token in tokenizer_config.json, or eos_token_id in generation_config.json, to the "
        "token that ends an answer.",
        turn,
        text,
    )


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
        ArtifactError: the chat template refuses a row, or no row has a token to learn.
    """
    end, encoded = tokenizer.eos_token_id, []
    for ids, before, special in _rendered(rows, tokenizer, completion_only):
        if not special:
            _tell_end(tokenizer, ids[len(before) :])
        if special and end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        one = _cut(ids, len(before), max_length)
        if one.counting > 0:
            encoded.append(one)
    if not encoded:
        raise ArtifactError("No row has a token to learn. Check the rows, and max_length.")
    return encoded


def encode_pairs(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[Encoded]:
    """Encode rows to be scored as the harness does: as `encode`, without the end-of-text token, and none left out.

    Raises:
        UsageError: as of `encode`.
        ArtifactError: the chat template refuses a row, or a completion has no token.
    """
    parts = ((before, ids[len(before) :]) for ids, before, _ in _rendered(rows, tokenizer, True))
    found = [_cut([*before, *answer], len(before), max_length) for before, answer in parts]
    bad = next((number for number, one in enumerate(found) if one.counting < 1), None)
    if bad is not None:
        raise ArtifactError(f"The answer of {rows[bad]!r:.200} has no token within max_length.")
    return found


def _cut(ids: Sequence[int], start: int, max_length: int) -> Encoded:
    whole, cut = len(ids), max(0, min(start, len(ids) - max_length))
    return Encoded(array("i", ids[cut:][:max_length]), max(start - cut, 1), whole > max_length)


def _rendered(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, completion_only: bool
) -> Iterator[tuple[list[int], list[int], bool]]:
    """Token ids of each row, those of its prompt, and whether the tokenizer may add its special tokens."""
    for begin in range(0, len(rows), _AT_ONCE):
        pairs = []
        for number, row in enumerate(rows[begin : begin + _AT_ONCE], begin + 1):
            try:
                pairs.append(_pair(row, tokenizer, completion_only))
            except FedproxyError:
                raise
            except Exception as error:  # a template is the model's own program
                raise ArtifactError(f"Row {number}: the model's chat template does not take it: {error}.") from error
        found = {
            special: _tokens([pair for pair in pairs if pair[2] is special], tokenizer, special)
            for special in (True, False)
        }
        for _, _, special in pairs:
            yield *next(found[special]), special
