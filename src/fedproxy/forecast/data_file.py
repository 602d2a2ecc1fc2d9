"""What of a file of rows is trained on: for people to look at before anything is."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedproxy.config import Train
from fedproxy.data import read_rows
from fedproxy.models.checkpoints import Tokenizer, load_config, load_tokenizer, resolve
from fedproxy.models.encoding import Encoded, training_examples
from fedproxy.models.families import readable
from fedproxy.row_files import Row, format_of, numbered_rows
from fedproxy.row_formats import FIELDS, check_row, known_by, unanswered

_CONTENT = ("prompt", "completion", "messages", "tools", "text")
Part = dict[str, Any]
"""A piece of a row: its "text", and whether it "counts" in the loss."""


def check_data(
    path: Path, model: str | None, train: Train, *, first: int, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Read a file of rows as a client would, and tell what is trained on.

    Args:
        path: A file or folder as of `read_rows`.
        model: The LLM, a directory or a Hub id, of which tokenizer and configuration are read; without one there are no
            tokens, and rows are shown as they stand in the file.
        train: The [train] table.
        first: How many rows are shown.
        trust_remote_code: Let the model's own Python code run.

    Returns:
        "file", "format", "rows_of" (the format of the rows), "rows", "unanswered" (more rows, which are left out),
        "duplicates" (rows whose content an earlier row has), "columns" (name → {"rows" that have it, "used": whether it
        is content}); "first", the parts of the first rows; with a model also "tokens" and "counting", sums of what is
        trained on in an epoch, "longest", "cut" (rows that max_length shortens), "lost" (rows without a token to learn,
        which are left out), and "max_length".

    Raises:
        ArtifactError, UsageError: as of `read_rows` and `training_examples`.
    """
    rows = read_rows(path)
    columns, content, left_out = Counter[str](), set[str](), 0
    for _, row in numbered_rows(path):
        left_out += unanswered(row)
        columns.update(row.keys())
        content.update(FIELDS[known_by(row)])
    found = {
        "file": str(path),
        "format": format_of(path),
        "rows_of": check_row(rows[0]),
        "rows": len(rows),
        "unanswered": left_out,
        "duplicates": len(rows) - len({_digest(row) for row in rows}),
        "columns": {name: {"rows": count, "used": name in content} for name, count in columns.items()},
    }
    if model is None:
        return {**found, "first": [_as_written(row, train) for row in rows[:first]]}
    directory = resolve(model, weights=False)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    longest = readable(load_config(directory, trust_remote_code=trust_remote_code), train.max_length)
    examples = training_examples(rows, tokenizer, train, longest)
    return {
        **found,
        "max_length": longest,
        "tokens": sum(len(example.ids) for example in examples),
        "counting": sum(example.counting for example in examples),
        "longest": max(len(example.ids) for example in examples),
        "cut": sum(example.cut for example in examples),
        "lost": len(rows) - len(examples),
        "first": [_as_trained(example, tokenizer) for example in examples[:first]],
    }


def _digest(row: Row) -> bytes:
    content = {name: row[name] for name in _CONTENT if name in row}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()


def _as_trained(example: Encoded, tokenizer: Tokenizer) -> list[Part]:
    return [
        {"text": str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)), "counts": counts}
        for ids, counts in example.parts()
    ]


def _as_written(row: Row, train: Train) -> list[Part]:
    if "messages" not in row:
        parts = ((row.get("prompt"), not train.completion_only_loss), (row.get("completion", row.get("text")), True))
        return [{"text": text, "counts": counts} for text, counts in parts if text]
    whole, last = not (train.completion_only_loss or train.assistant_only_loss), len(row["messages"])
    return [
        {
            "text": _message(message),
            "counts": whole or (message["role"] == "assistant" and (train.assistant_only_loss or number == last)),
        }
        for number, message in enumerate(row["messages"], 1)
    ]


def _message(message: Mapping[str, Any]) -> str:
    calls = "".join(f" {json.dumps(call, ensure_ascii=False)}" for call in message.get("tool_calls") or ())
    return f"{message['role']}: {message['content'] or ''}{calls}\n"
