"""A client's rows as token ids, made once for all rounds."""

import functools
import itertools
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedproxy.artifacts import read_json
from fedproxy.config import Train
from fedproxy.errors import ArtifactError, FedproxyError, UsageError
from fedproxy.models.tokens import answer_ids, text_ids
from fedproxy.models.turns import check_template, conversation, rendered

_log = logging.getLogger(__name__)

_AT_ONCE = 1000
"""Rows that the tokenizer is given together: fast ones share them out among the processors."""

_FIRST_WORDS = 8


@dataclass(frozen=True)
class Encoded:
    """One training example.

    Attributes:
        ids: Token ids; `encode` keeps them as 32-bit integers.
        start: Position of the first one that counts in the loss, at least 1.
        cut: Whether the row has more than these.
        gaps: Stretches after it that do not count, each as its first position and the one behind its last: what others
            say between the assistant's turns.
    """

    ids: Sequence[int]
    start: int
    cut: bool = False
    gaps: tuple[tuple[int, int], ...] = ()

    @property
    def counting(self) -> int:
        """How many of its tokens count in the loss."""
        return len(self.ids) - self.start - sum(end - begin for begin, end in self.gaps)

    def parts(self) -> Iterator[tuple[Sequence[int], bool]]:
        """Its tokens in stretches, and whether each counts."""
        place = 0
        for begin, end in ((0, self.start), *self.gaps):
            if place < begin:
                yield self.ids[place:begin], True
            if begin < end:
                yield self.ids[begin:end], False
            place = end
        if place < len(self.ids):
            yield self.ids[place:], True


def _pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, completion_only: bool) -> tuple[str, str, bool]:
    """A row as (prompt, completion, whether the tokenizer may add its special tokens)."""
    if "messages" in row:
        check_template(tokenizer)
        count = len(row["messages"])
        whole = rendered(row, tokenizer, count)
        prompt = rendered(row, tokenizer, count - 1, add_generation_prompt=True)
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
    assistant_only: bool = False,
) -> list[Encoded]:
    """Encode rows in TRL's formats.

    Prompt and completion are encoded together, and the prompt alone tells where the completion begins; trailing
    spaces of the prompt belong to the completion. That is how the LM evaluation harness encodes what it scores, so
    that training tokens are scored tokens. The end-of-text token follows each completion. What is longer than
    `max_length` loses the beginning of its prompt (the harness truncates on the same side), then the end of its
    completion.

    Args:
        rows: The rows, in the form of `row_formats.in_trl_form`.
        tokenizer: The model's.
        max_length: Tokens of a row at most.
        completion_only: Only the completion counts, of a conversation the last message; of a text everything.
        assistant_only: Of a conversation all turns of the assistant count, whatever `completion_only` says.

    Raises:
        UsageError: rows hold messages and the tokenizer has no usable chat template.
        ArtifactError: the chat template refuses a row, or no row has a token to learn.
    """
    end, encoded = tokenizer.eos_token_id, []
    for whole, _, special in _rendered(rows, tokenizer, completion_only, assistant_only):
        if not special:
            _tell_end(tokenizer, [token for part, counts in whole.parts() if counts for token in part])
        elif end is not None and (not whole.ids or whole.ids[-1] != end):
            whole = replace(whole, ids=[*whole.ids, end])
        kept = _cut(whole, max_length)
        if kept.counting > 0:
            encoded.append(kept)
    if not encoded:
        raise ArtifactError("No row has a token to learn. Check the rows, and max_length.")
    return encoded


def prompt_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """What stands before a row's answer, as training renders it, and whether the tokenizer adds its special tokens.

    A plain text has no answer: its first words stand for one's prompt.

    Raises:
        UsageError, ArtifactError: as of `encode`.
    """
    if "text" in row:
        return " ".join(row["text"].split()[:_FIRST_WORDS]), True
    prompt, _, special = _pair(row, tokenizer, True)
    return prompt, special


def training_examples(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, train: Train, longest: int
) -> list[Encoded]:
    """Encode rows as [train] says, with at most `longest` tokens each; errors as of `encode`."""
    return encode(
        rows,
        tokenizer,
        max_length=longest,
        completion_only=train.completion_only_loss,
        assistant_only=train.assistant_only_loss,
    )


def encode_pairs(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[Encoded]:
    """Encode rows to be scored as the harness does: as `encode`, without the end-of-text token, and none left out.

    Raises:
        UsageError: as of `encode`.
        ArtifactError: the chat template refuses a row, or a completion has no token.
    """
    parts = ((before, whole.ids[len(before) :]) for whole, before, _ in _rendered(rows, tokenizer, True, False))
    found = [_cut(Encoded([*before, *answer], len(before)), max_length) for before, answer in parts]
    bad = next((number for number, one in enumerate(found) if one.counting < 1), None)
    if bad is not None:
        raise ArtifactError(f"The answer of {rows[bad]!r:.200} has no token within max_length.")
    return found


def _rendered(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, completion_only: bool, assistant_only: bool
) -> Iterator[tuple[Encoded, Sequence[int], bool]]:
    """Each row in full, the tokens of what comes before its answer, and whether it may have special tokens added."""
    for begin in range(0, len(rows), _AT_ONCE):
        pairs, talks = {}, {}
        for number, row in enumerate(rows[begin : begin + _AT_ONCE], begin + 1):
            try:
                if assistant_only and "messages" in row:
                    talks[number] = conversation(row, tokenizer)
                else:
                    pairs[number] = _pair(row, tokenizer, completion_only)
            except FedproxyError:
                raise
            except Exception as error:  # a template is the model's own program
                raise ArtifactError(f"Row {number}: the model's chat template does not take it: {error}.") from error
        found = {
            special: _tokens([pair for pair in pairs.values() if pair[2] is special], tokenizer, special)
            for special in (True, False)
        }
        for number in sorted(pairs | talks):
            if number in talks:
                whole = _masked(*talks[number])
                yield whole, whole.ids[: whole.start], False
            else:
                special = pairs[number][2]
                ids, before = next(found[special])
                yield Encoded(ids, len(before)), before, special


def _masked(ids: Sequence[int], mask: Sequence[bool]) -> Encoded:
    """The example of which those tokens count that `mask` says."""
    edges = [place for place, (one, after) in enumerate(itertools.pairwise([False, *mask, False])) if one is not after]
    stretches = list(zip(edges[::2], edges[1::2], strict=True))  # those that count
    start = stretches[0][0] if stretches else len(mask)
    ends, begins = [end for _, end in stretches], [begin for begin, _ in stretches[1:]]
    gaps = zip(ends, [*begins, len(mask)], strict=True)
    return Encoded(ids, start, gaps=tuple((begin, end) for begin, end in gaps if begin < end))


def _cut(whole: Encoded, most: int) -> Encoded:
    """An example without the beginning of its prompt, and then without its end, as far as it is too long."""
    cut = max(0, min(whole.start, len(whole.ids) - most))
    ids, start = whole.ids[cut:][:most], max(whole.start - cut, 1)
    clipped = ((max(begin - cut, start), min(end - cut, len(ids))) for begin, end in whole.gaps)
    gaps = tuple((begin, end) for begin, end in clipped if begin < end)
    return Encoded(array("i", ids), start, len(whole.ids) > most, gaps)
