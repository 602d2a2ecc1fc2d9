"""What the fields of a row mean: TRL's formats, and Alpaca's and ShareGPT's names for the same."""

from collections.abc import Mapping
from typing import Any

from fedproxy.artifacts import parse_json

Row = dict[str, Any]
FORMATS = (
    '{"prompt", "completion"} (strings or lists of messages), {"messages": [{"role", "content"}, ...]}, {"text"}, '
    'Alpaca\'s {"instruction", "input", "output"} or ShareGPT\'s {"conversations": [{"from", "value"}, ...]}'
)
FIELDS = {
    "prompt": ("prompt", "completion", "tools"),
    "messages": ("messages", "tools"),
    "conversations": ("conversations", "tools"),
    "instruction": ("instruction", "input", "output"),
    "text": ("text",),
}
"""The field by which a format is known → all its fields. "label" divides rows among clients; any other is kept."""
_KNOWN_BY = {name: name for name in FIELDS} | {"completion": "prompt"}
_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("user", "assistant", "system", "tool")}
"""ShareGPT's "from" → the role."""
_UNDERSTOOD = {name for names in FIELDS.values() for name in names}


def known_by(row: Mapping[str, Any]) -> str:
    """The field by which the format of a row is known.

    Raises:
        ValueError: it is of no known format, or of several.
    """
    kinds = {_KNOWN_BY[name] for name, value in row.items() if name in _KNOWN_BY and value is not None}
    if "instruction" in kinds:
        kinds.discard("text")
    if len(kinds) != 1:
        several = " of several formats at once," if kinds else ""
        filled = sorted(name for name, value in row.items() if value is not None)
        raise ValueError(f"a row{several} with the fields {filled}; known formats: {FORMATS}")
    return kinds.pop()


def unanswered(row: Mapping[str, Any]) -> bool:
    """Whether a row under Alpaca's names has an empty output, as a few of its own data set have: nothing to learn.

    A null is empty, too: pandas makes one of the empty cell of a CSV. An output that is not there is an error instead.

    Raises:
        ValueError: as of `known_by`.
    """
    return known_by(row) == "instruction" and row.get("output", "missing") in ("", None)


def in_trl_form(row: Mapping[str, Any]) -> Row:
    """A row with its content under TRL's names: "prompt" and "completion", "messages" or "text"; the rest is kept.

    Prompt and completion as lists of messages become one list. Alpaca's instruction and input, a line each, are the
    prompt, and its output the completion; the "text" of its own data set, which repeats them, is left out. What a
    table cannot hold otherwise may be JSON in a string: messages, tools, and the arguments of tool calls. A null is a
    field that is not there, since tables fill up with nulls what other rows have; but a message that only calls tools
    has the content null, written or not.

    Raises:
        ValueError: what is wrong with the row.
        ArtifactError: a string should hold JSON and does not.
    """
    kind = known_by(row)
    row = {name: value for name, value in row.items() if not (value is None and name in _UNDERSTOOD)}
    if kind == "instruction":
        row = _instructed(row)
    for name in ("messages", "conversations", "tools"):
        if isinstance(row.get(name), str):
            row[name] = parse_json(row[name], name) if row[name] or name != "tools" else None
    if "conversations" in row:
        row["messages"] = _told(row.pop("conversations"))
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        row["messages"] = _joined(row.pop("prompt"), row.pop("completion"))
    if "tools" in row:
        row["tools"] = _filled(row["tools"])
    if isinstance(row.get("messages"), list):
        row["messages"] = [_called(_filled(message)) for message in row["messages"]]
    return row


def check_row(row: Mapping[str, Any]) -> str:
    """Name the format of a row in TRL's form.

    Raises:
        ValueError: what is wrong with the row.
    """
    if "text" in row:
        _check_text(row["text"], "text")
        return "text"
    if "messages" in row:
        _check_messages(row["messages"])
        _check_tools(row.get("tools"))
        return "messages"
    for name in ("prompt", "completion"):
        if name not in row:
            raise ValueError(f"{name} is missing among the fields {sorted(row)}; known formats: {FORMATS}")
        _check_text(row[name], name, empty=name == "prompt")
    return "prompt and completion"


def _instructed(row: Row) -> Row:
    for name in ("instruction", "input", "output"):
        if not isinstance(row.get(name, "" if name == "input" else None), str):
            what = f"a {type(row[name]).__name__}" if name in row else "missing"
            raise ValueError(f"{name} is {what}, where a string is expected; known formats: {FORMATS}")
    parts = [part for part in (row["instruction"], row.get("input", "")) if part]
    rest = {name: value for name, value in row.items() if name not in ("instruction", "input", "output", "text")}
    return {**rest, "prompt": "".join(f"{part}\n" for part in parts), "completion": row["output"]}


def _told(conversations: Any) -> Any:
    if not isinstance(conversations, list):
        raise ValueError(f"conversations is a {type(conversations).__name__}, where a list of messages is expected")
    messages = []
    for number, message in enumerate(conversations, 1):
        if isinstance(message, dict) and isinstance(message.get("from"), str):
            if (role := _ROLES.get(message["from"])) is None:
                raise ValueError(f"message {number} is from {message['from']!r}, known are {', '.join(_ROLES)}")
            rest = {name: value for name, value in message.items() if name not in ("from", "value")}
            message = {"role": role, "content": message.get("value"), **rest}
        messages.append(message)
    return messages


def _joined(prompt: list[Any], completion: list[Any]) -> list[Any]:
    if len(completion) != 1:
        raise ValueError(f"completion holds {len(completion)} messages, where one, of the assistant, is expected")
    return prompt + completion


def _filled(value: Any) -> Any:
    """A value without the fields that are null, at any depth."""
    if isinstance(value, dict):
        return {name: _filled(inner) for name, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _called(message: Any) -> Any:
    """A message whose tool calls have their arguments as values, and which has a content."""
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


def _check_text(value: object, name: str, *, empty: bool = False) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}, where a string is expected")
    if not value and not empty:
        raise ValueError(f"{name} is empty")
    value.encode()


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is no list of messages, or an empty one")
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


def _check_tools(tools: Any) -> None:
    if not isinstance(tools or [], list):
        raise ValueError(f"tools is a {type(tools).__name__}, where a list is expected")
    for position, tool in enumerate(tools or [], 1):
        if not isinstance(tool, dict):
            raise ValueError(f"tool {position} is a {type(tool).__name__}, where an object is expected")
