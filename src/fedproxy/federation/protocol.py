"""What goes over a wire: an order or an answer is one safetensors byte string whose metadata hold its head as JSON.

Nothing that comes in is believed. Bytes are counted before they are kept, a head is short, flat and of known keys and
types, the tensors must fill the rest exactly (`tensor_files.read_header`), and an update is mapped, not loaded.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch

from fedproxy.artifacts import os_error, versions
from fedproxy.config import CLIENT_NAME
from fedproxy.errors import ArtifactError
from fedproxy.federation.messages import Order, Refusal, Reply, level_dtype
from fedproxy.tensor_files import DTYPE_NAMES, TensorFile, header_bytes, load_tensors, read_header, tensor_bytes
from fedproxy.tensors import MappedTensors, Tensors, check_finite

PROTOCOL = 1
"""Rises when an order, an answer or an offer changes so that an older fedproxy would misread it."""
HEAD_BYTES = 4096
"""Of a head at most so much is read."""
_REASON_CHARACTERS = 500
_COUNT_LIMIT = 1 << 53
_ADAPTER, _CONFLICT = "adapter/", "conflict/"

Rule = Callable[[Any], bool]


def version() -> str:
    """The version of fedproxy."""
    return versions().get("fedproxy", "unknown")


def check_protocol(theirs: object, release: object, who: str) -> None:
    """Check that the other side speaks this protocol.

    Raises:
        ArtifactError: it does not; both versions are named.
    """
    if type(theirs) is not int or theirs != PROTOCOL:
        raise ArtifactError(
            f"{who} speaks protocol {theirs!r:.20} (fedproxy {release!r:.40}), this side protocol {PROTOCOL} (fedproxy "
            f"{version()!r}). Install the same version of fedproxy on both sides."
        )


def _count(least: int) -> Rule:
    return lambda value: type(value) is int and least <= value < _COUNT_LIMIT


def _number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < _COUNT_LIMIT and math.isfinite(value)  # type: ignore[arg-type]


def _name(value: object) -> bool:
    return isinstance(value, str) and CLIENT_NAME.fullmatch(value) is not None


def _reason(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _REASON_CHARACTERS


_HEADS: dict[str, dict[str, Rule]] = {
    "order": {"round": _count(1), "voters": _count(0)},
    "reply": {
        "client": _name,
        "round": _count(1),
        "rows": _count(1),
        "tokens": _count(0),
        "steps": _count(1),
        "loss": _number,
        "seconds": lambda value: _number(value) and value >= 0,
    },
    "refusal": {
        "client": _name,
        "round": _count(1),
        "kind": lambda value: value in ("declined", "failed"),
        "reason": _reason,
    },
}
"""For each message, the fields of its head and what holds for their values; they are the fields of its dataclass."""


def _encode(message: str, head: Mapping[str, object], tensors: Tensors) -> bytes:
    whole = {"message": message, "protocol": PROTOCOL, "version": version(), **head}
    entries = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in sorted(tensors.items())}
    header = header_bytes(entries, {"head": json.dumps(whole, allow_nan=False)})
    return b"".join([header, *(tensor_bytes(tensors[name].detach().cpu()) for name in entries)])


def _limit(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes of the tensors and their header, and what a head may add, each of its characters escaped."""
    header = header_bytes({name: (DTYPE_NAMES[dtype], shape) for name, (dtype, shape) in tensors.items()})
    return len(header) + sum(dtype.itemsize * prod(shape) for dtype, shape in tensors.values()) + 2 * HEAD_BYTES


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(pairs) if len(dict(pairs)) == len(pairs) else _refuse("a key occurs twice")


def _integer(digits: str) -> int:
    return int(digits) if len(digits) < 20 else _refuse("a number has too many digits")


def strict_json(text: str) -> Any:
    """Parse JSON without NaN, infinities, repeated keys and whole numbers of twenty digits or more.

    Raises:
        ValueError: it is no such JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_integer)


def _head(file: TensorFile, who: str, *messages: str) -> tuple[str, dict[str, Any]]:
    """The checked head of a message: which of `messages` it is, and its fields.

    Raises:
        ArtifactError: it is none of them, of another protocol, or a field is missing, unknown or impossible.
    """
    text = file.metadata.get("head", "")
    if len(text) > HEAD_BYTES:
        raise ArtifactError(f"{who}: the head takes {len(text)} characters, {HEAD_BYTES} are read at most.")
    try:
        head = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{who}: the head is no JSON: {error!s:.100}.") from error
    if not isinstance(head, dict):
        raise ArtifactError(f"{who}: the head is no table.")
    check_protocol(head.pop("protocol", None), head.pop("version", None), who)
    message = head.pop("message", None)
    if message not in messages:
        raise ArtifactError(f"{who}: it is {message!r:.40}, expected {' or '.join(messages)}.")
    rules = _HEADS[message]
    for key in sorted(rules.keys() ^ head.keys()):
        raise ArtifactError(
            f"{who}: the head of a {message} {'lacks' if key in rules else 'has no field'} {key!r:.40}."
        )
    for key, rule in rules.items():
        if not rule(head[key]):
            raise ArtifactError(f"{who}: {key} is {head[key]!r:.40}, which no {message} can hold.")
    return message, head


def encode_order(order: Order) -> bytes:
    """The bytes of an order.

    The conflict goes as its level K − |Σ sign| in one byte a coordinate (two for more than 255 voters); level / K in
    float32 is the conflict again, to the bit.
    """
    tensors = {_ADAPTER + name: tensor for name, tensor in order.adapter.items()}
    for name, values in (order.conflict or {}).items():
        levels = (values * order.voters).round().to(torch.int32)
        if not torch.equal(levels.float() / order.voters, values):
            raise AssertionError(f"the conflict of {name} is no multiple of 1/{order.voters}")
        tensors[_CONFLICT + name] = levels.to(level_dtype(order.voters))
    return _encode("order", {"round": order.round, "voters": order.voters}, tensors)


def order_limit(adapter: Tensors) -> int:
    """The most bytes that an order for an adapter of this layout takes; a client counts before it keeps any."""
    layout = {_ADAPTER + name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in adapter.items()}
    return _limit(layout | {_CONFLICT + name: (torch.uint16, tuple(tensor.shape)) for name, tensor in adapter.items()})


def decode_order(data: bytes) -> Order:
    """The order that `encode_order` made.

    Raises:
        ArtifactError: the bytes are no order, of another protocol, or inconsistent.
        ResourceError: there is no room for them in the temporary folder.
    """
    who = "the order"
    with tempfile.NamedTemporaryFile(prefix="fedproxy-order-") as file:
        path = Path(file.name)
        try:
            file.write(data)
            file.flush()
        except OSError as error:
            raise os_error(error, path) from error
        _, head = _head(read_header(path), who, "order")
        tensors = load_tensors(path)
    adapter = {name.removeprefix(_ADAPTER): t for name, t in tensors.items() if name.startswith(_ADAPTER)}
    levels = {name.removeprefix(_CONFLICT): t for name, t in tensors.items() if name.startswith(_CONFLICT)}
    if len(adapter) + len(levels) < len(tensors):
        raise ArtifactError(f"{who}: a tensor belongs neither to the adapter nor to the conflict.")
    if not adapter or not all(tensor.is_floating_point() for tensor in adapter.values()):
        raise ArtifactError(f"{who}: the adapter is empty, or not floating point.")
    check_finite(adapter, who)
    voters = head["voters"]
    if bool(levels) != bool(voters) or (levels and levels.keys() != adapter.keys()):
        raise ArtifactError(f"{who}: {voters} voters, and a conflict of {len(levels)} of {len(adapter)} tensors.")
    conflict = {name: _shares(level, adapter[name].shape, voters, name) for name, level in levels.items()}
    return Order(head["round"], adapter, conflict or None, voters)


def _shares(levels: torch.Tensor, shape: torch.Size, voters: int, name: str) -> torch.Tensor:
    """Levels 0 ... K as conflict, float32, each exactly what the server's division gave."""
    if levels.dtype != level_dtype(voters) or levels.shape != shape:
        raise ArtifactError(
            f"the order: the conflict of {name} has shape {list(levels.shape)} and dtype {levels.dtype}."
        )
    whole = levels.to(torch.int32)
    if whole.numel() and int(whole.max()) > voters:
        raise ArtifactError(f"the order: the conflict of {name} exceeds 1.")
    return whole.float() / voters


def encode_reply(answer: Reply | Refusal) -> bytes:
    """The bytes of a client's reply, or of its refusal (of kind "declined" or "failed")."""
    if isinstance(answer, Refusal):
        reason = answer.reason[:_REASON_CHARACTERS]
        return _encode("refusal", {**_fields(answer, "refusal"), "reason": reason}, {})
    return _encode("reply", _fields(answer, "reply"), answer.update)


def _fields(answer: Reply | Refusal, message: str) -> dict[str, object]:
    return {key: getattr(answer, key) for key in _HEADS[message]}


def reply_limit(order: Order) -> int:
    """The most bytes that a reply to `order` takes: its exact size, and a few KiB for the head."""
    return _limit({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in order.adapter.items()})


def read_reply(path: Path, who: str) -> Reply | Refusal:
    """Read an answer from a file. The update stays there: it is mapped, and judged by the coordinator.

    Args:
        path: The file.
        who: Whose answer it is, for the error.

    Raises:
        ArtifactError: the bytes are no answer, of another protocol, or the head holds something impossible.
    """
    try:
        file = read_header(path)
        message, head = _head(file, who, "reply", "refusal")
        if message == "reply":
            return Reply(update=MappedTensors(path, file.entries), **head)
    except ArtifactError as error:
        raise ArtifactError(str(error).replace(str(path), who)) from error
    if file.entries:
        raise ArtifactError(f"{who}: a refusal holds tensors.")
    return Refusal(**head)


def take_reply(data: bytes, path: Path, order: Order, sender: str) -> Reply | Refusal:
    """Turn what a client sent in answer to `order` into an answer for the coordinator.

    Args:
        data: The bytes as received.
        path: File of the open round's spool folder to keep them in, for as long as the round is open.
        order: The order that is open.
        sender: The client, as the transport knows it.

    Returns:
        Its reply or refusal; a refusal of kind "invalid" if the bytes are too many or cannot be read.

    Raises:
        UsageError, ResourceError: the file cannot be written.
    """
    most = reply_limit(order)
    if len(data) > most:
        return Refusal(sender, order.round, f"it sent {len(data)} bytes, a reply takes at most {most}", "invalid")
    try:
        path.write_bytes(data)
    except OSError as error:
        raise os_error(error, path) from error
    try:
        return read_reply(path, sender)
    except ArtifactError as error:
        return Refusal(sender, order.round, str(error), "invalid")
