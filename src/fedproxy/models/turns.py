"""Which tokens of a conversation its assistant wrote."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedproxy.errors import UsageError
from fedproxy.models.tokens import check_embedded

_MARKED = re.compile(r"{%-?\s*generation\s*-?%}")


def rendered(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, messages: int, **how: Any) -> str:
    """The first messages of a row as the model's chat template renders them, with the row's tools."""
    return str(tokenizer.apply_chat_template(row["messages"][:messages], tools=row.get("tools"), tokenize=False, **how))


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer has a chat template.

    Raises:
        UsageError: it has none.
    """
    if tokenizer.chat_template is None:
        raise UsageError("The rows hold messages, but the model's tokenizer has no chat template.")


def conversation(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and whether each counts because the assistant wrote it, all its turns alike.

    A chat template that marks them with {% generation %} says itself what the assistant wrote; TRL takes its word, too.
    Otherwise a turn is what the template adds to the conversation before it: from where a generation would begin, less
    the white space before, which belongs to the answer as with `encode`, to the turn's end. A token that lies
    partly in a turn counts.

    Args:
        row: A row with "messages" and perhaps "tools".
        tokenizer: The model's.

    Raises:
        UsageError: there is no chat template, or it has no such marks and renders a turn in another way once others
            follow; or the tokenizer cannot tell which letters a token stands for.
        ArtifactError: the conversation holds a token that has no row in the embedding.
    """
    check_template(tokenizer)
    if not tokenizer.is_fast:
        raise UsageError("assistant_only_loss needs a fast tokenizer, one with a tokenizer.json.")
    tools = row.get("tools")
    if _MARKED.search(tokenizer.get_chat_template(tools=tools)):
        found: Any = tokenizer.apply_chat_template(
            row["messages"], tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = found["input_ids"], [bool(one) for one in found["assistant_masks"]]
    else:
        whole = rendered(row, tokenizer, len(row["messages"]))
        turns = _turns(row, tokenizer, whole)
        found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, mask = found["input_ids"], _touched(found["offset_mapping"], turns)
    check_embedded(tokenizer, ids)
    return ids, mask


def _turns(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, whole: str) -> list[tuple[int, int]]:
    turns = []
    for number, message in enumerate(row["messages"]):
        if message["role"] != "assistant":
            continue
        before = rendered(row, tokenizer, number, add_generation_prompt=True)
        until = rendered(row, tokenizer, number + 1)
        if not whole.startswith(until):  # some templates end the whole conversation, and no turn, so
            until = until.removesuffix(tokenizer.eos_token or "")
        if not (until.startswith(before) and whole.startswith(until)):
            raise UsageError(
                f"The chat template renders message {number + 1}, of the assistant, in another way once others follow. "
                "For assistant_only_loss mark in it what the assistant writes: {% generation %} … {% endgeneration %}."
            )
        turns.append((len(before.rstrip()), len(until)))
    return turns


def _touched(offsets: list[tuple[int, int]], turns: list[tuple[int, int]]) -> list[bool]:
    """Whether each token, which stands for the letters from its first number up to its second, lies in a turn."""
    touched, current = [], 0
    for begin, end in offsets:
        while current < len(turns) and turns[current][1] <= begin:
            current += 1
        touched.append(current < len(turns) and end > turns[current][0] and end > begin)
    return touched
