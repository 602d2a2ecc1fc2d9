"""The clients' rows: JSON Lines in TRL's formats, checked line by line, and one file divided among clients."""

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedproxy.artifacts import parse_json
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.seeds import derive_seed

Row = dict[str, Any]
_SCHEMES = ("dirichlet", "iid")
FORMATS = (
    '{"prompt", "completion"} (strings or lists of messages), {"messages": [{"role", "content"}, ...]} or {"text"}'
)


def read_objects(path: Path, limit: int | None = None) -> list[Row]:
    """Read a JSON Lines file of objects, in UTF-8; blank lines are passed over, a name ending in .gz is unpacked.

    Raises:
        ArtifactError: the file is missing or empty, or a line is no JSON object; file and line are named.
        UsageError: `limit` is below 1.
    """
    return [row for _, row in _numbered_objects(Path(path), limit)]


def read_rows(path: str | Path | Sequence[Row], limit: int | None = None) -> list[Row]:
    """Read training rows in one of TRL's formats; further fields, such as a label, are kept.

    Args:
        path: A JSON Lines file, UTF-8; a name ending in .gz is unpacked. Or the rows themselves, to be checked.
        limit: Read at most this many rows; None reads all.

    Returns:
        One dict per line, in file order, all of the same format. Where prompt and completion are lists of messages,
        they come as the format of messages: one list, whose last message is the answer.

    Raises:
        ArtifactError: the file is missing or empty, a line is no JSON object, a field has the wrong type or is
            empty, or the rows are of no known format or of several; file and line are named.
        UsageError: `limit` is below 1.

    Example:
        A line of a file that `read_rows` takes: `{"prompt": "2 + 2 =", "completion": " 4"}`
    """
    if isinstance(path, str | Path):
        numbered, line = _numbered_objects(Path(path), limit), f"{path}, line"
    else:
        numbered, line = iter(enumerate(path[:limit], 1)), "row"
    rows: list[Row] = []
    first = ""
    for number, row in numbered:
        where = f"{line} {number}"
        try:
            if not isinstance(row, Mapping):
                raise ValueError(f"a {type(row).__name__}, where an object is expected")
            row = _called(_joined(row))
            kind = _check_row(row)
        except (ValueError, ArtifactError) as error:
            raise ArtifactError(f"{where}: {str(error).rstrip('.')}.") from error
        first = first or kind
        if kind != first:
            raise ArtifactError(
                f"{where}: a row of the format {kind}, the rows above are of the format {first}. "
                "Give each format a file of its own."
            )
        rows.append(row)
    return rows


def partition(
    rows: Sequence[Row], clients: int, scheme: str = "iid", alpha: float = 0.5, seed: int = 0, label: str | None = None
) -> list[list[Row]]:
    """Divide rows among clients: every row goes to exactly one client, every client gets at least one.

    `iid` deals shuffled rows out evenly. `dirichlet` draws, for each label c, shares p_c ~ Dir(alpha·1) over the
    clients and gives each row of that label to a client by p_c: the smaller alpha, the fewer labels a client sees.
    A client left without a row gets one of the client that has the most.

    Args:
        rows: The rows; they keep their order within a client.
        clients: Number of clients.
        scheme: "iid" or "dirichlet".
        alpha: Concentration of the Dirichlet distribution, above 0.
        seed: The same seed gives the same division.
        label: Field that holds a row's label for `dirichlet`; by default "label" if every row carries it, else the
            answer: the completion, or the last message; of answers half as many as rows may be different.

    Returns:
        One list of rows per client.

    Raises:
        UsageError: fewer rows than clients, clients below 1, alpha not above 0, an unknown scheme, or rows without a
            label for `dirichlet`, or of answers that are free text.

    Reference:
        Hsu, Qi, Brown: "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification", arXiv 1909.06335.
    """
    if scheme not in _SCHEMES:
        raise UsageError(f"unknown partition scheme {scheme!r}. Known: {', '.join(_SCHEMES)}.")
    if clients < 1:
        raise UsageError(f"{clients} clients: give at least 1.")
    if len(rows) < clients:
        raise UsageError(f"{len(rows)} rows cannot be divided among {clients} clients: give each at least one row.")
    if not (math.isfinite(alpha) and alpha > 0):
        raise UsageError(f"alpha is {alpha}: give a finite number above 0.")
    generator = np.random.default_rng(derive_seed(seed, "partition", scheme))
    if scheme == "iid":
        order = generator.permutation(len(rows)).tolist()
        shares = [order[client::clients] for client in range(clients)]
    else:
        shares = _dirichlet(_labels(rows, label), clients, alpha, generator)
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return [[rows[index] for index in sorted(share)] for share in shares]


def _dirichlet(labels: Sequence[str], clients: int, alpha: float, generator: np.random.Generator) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for index, value in enumerate(labels):
        groups.setdefault(value, []).append(index)
    shares: list[list[int]] = [[] for _ in range(clients)]
    for value in sorted(groups):
        members = generator.permutation(groups[value])
        counts = generator.multinomial(len(members), generator.dirichlet([alpha] * clients))
        for share, part in zip(shares, np.split(members, np.cumsum(counts)[:-1]), strict=True):
            share.extend(part.tolist())
    return shares


def _labels(rows: Sequence[Row], field: str | None) -> list[str]:
    if field is None and all("label" in row for row in rows):
        field = "label"
    if field is not None:
        missing = next((number for number, row in enumerate(rows, 1) if field not in row), None)
        if missing is not None:
            raise UsageError(f"row {missing} has no field {field!r} to divide by.")
        return [json.dumps(row[field], sort_keys=True) for row in rows]
    if any("text" in row for row in rows):
        raise UsageError('rows of {"text"} have no answer to divide by: add a field "label", or use the scheme "iid".')
    answers = [str(row["messages"][-1]["content"]) if "messages" in row else row["completion"] for row in rows]
    if (different := len(set(answers))) > len(rows) / 2:
        raise UsageError(
            f"{len(rows)} rows have {different} different answers, which are no classes to divide by: add a field "
            '"label", or use scheme = "iid".'
        )
    return answers


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArtifactError(f"{path} is no gzip file, or is truncated: {error}.") from error
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error


def _numbered_objects(path: Path, limit: int | None) -> Iterator[tuple[int, Row]]:
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} rows: give at least 1.")
    count = 0
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise ArtifactError(f"{path}, line {number}: a JSON {type(row).__name__}, where an object is expected.")
        yield number, row
        count += 1
        if count == limit:
            return
    if not count:
        raise ArtifactError(f"{path} holds no rows.")


def _check_text(value: object, name: str, *, empty: bool = False) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}, where a string is expected")
    if not value and not empty:
        raise ValueError(f"{name} is empty")
    value.encode()


def _joined(row: Row) -> Row:
    """A row of conversational prompt and completion as one of messages; any other as it is."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if not (isinstance(prompt, list) and isinstance(completion, list)) or "messages" in row:
        return row
    if len(completion) != 1:
        raise ValueError(f"completion holds {len(completion)} messages, where one, of the assistant, is expected")
    rest = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
    return {**rest, "messages": prompt + completion}


def _called(row: Row) -> Row:
    """A row whose tools, and the arguments of whose tool calls, are values; some write them as JSON strings.

    A message that only calls tools may lack its content.
    """
    if isinstance(row.get("tools"), str):
        row = {**row, "tools": parse_json(row["tools"], "tools")}
    if not isinstance(row.get("messages"), list):
        return row
    return {**row, "messages": [_with_calls(message) for message in row["messages"]]}


def _with_calls(message: Any) -> Any:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not calls:
        return message
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError("tool_calls is no list of objects")
    return {"content": None, **message, "tool_calls": [_parsed(call) for call in calls]}


def _parsed(call: Row) -> Row:
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        return {**call, "function": {**function, "arguments": parse_json(function["arguments"], "arguments")}}
    return call


def _check_row(row: Mapping[str, Any]) -> str:
    """Name the format of a row, or raise ValueError with what is wrong with it."""
    named = {"prompt": "prompt", "completion": "prompt", "messages": "messages", "text": "text"}
    kinds = {kind for field, kind in named.items() if field in row}
    if not kinds:
        raise ValueError(f"a row with the fields {sorted(row)}; known formats: {FORMATS}")
    if len(kinds) > 1:
        raise ValueError(f"a row of several formats at once, with the fields {sorted(row)}; known formats: {FORMATS}")
    if kinds == {"prompt"}:
        for name in ("prompt", "completion"):
            if name not in row:
                raise ValueError(f"{name} is missing; known formats: {FORMATS}")
            _check_text(row[name], name, empty=name == "prompt")
        return "prompt and completion"
    if kinds == {"text"}:
        _check_text(row["text"], "text")
        return "text"
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is no list of messages, or an empty one")
    if not isinstance(row.get("tools") or [], list):
        raise ValueError(f"tools is a {type(row['tools']).__name__}, where a list is expected")
    for position, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'message {position} is no object with "role" and "content"')
        _check_text(message["role"], f"the role of message {position}")
        calls = bool(message.get("tool_calls"))
        if not (calls and message["content"] is None):
            empty = calls or message["role"] != "assistant"
            _check_text(message["content"], f"the content of message {position}", empty=empty)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message has the role {messages[-1]['role']!r}, where 'assistant' is expected")
    return "messages"
