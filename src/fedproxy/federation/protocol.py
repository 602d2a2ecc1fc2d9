"""What goes over a wire: an order or an answer is one safetensors byte string whose metadata hold its head as JSON.

Nothing that comes in is believed. Bytes are counted before they are kept and held against the hash in the head; a head
is short, flat and of known keys and types, the tensors must fill the rest exactly (`tensor_files.read_header`), and an
update is mapped, not loaded: one that came encoded is decoded to a file, tensor by tensor.
"""

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch

from fedproxy.artifacts import os_error, versions
from fedproxy.config import CLIENT_NAME, Choice, Federate, Rule, read_table, table
from fedproxy.errors import ArtifactError
from fedproxy.federation.messages import (
    WORDS,
    Answer,
    Ask,
    Order,
    Refusal,
    Reply,
    Score,
    Scored,
    Told,
    size_in_bytes,
)
from fedproxy.federation.parcel import Parcel, open_adapter
from fedproxy.federation.secure.asks import (
    COUNTS,
    LETTER,
    MOST_MEMBERS,
    ToldHead,
    ask_parts,
    check_words,
    letter_tensors,
    letters_of,
    letters_size,
    read_ask,
)
from fedproxy.federation.wire import ENCODINGS, PLAIN, encoding, pack_levels, unpack_levels
from fedproxy.tensor_files import (
    DTYPE_NAMES,
    TensorFile,
    header_bytes,
    load_tensors,
    read_header,
    tensor_bytes,
    write_tensors,
)
from fedproxy.tensors import MappedTensors, Tensors, check_finite, parameter_count

PROTOCOL = 8
"""Rises when an order, an answer or an offer changes so that an older fedproxy would misread it."""
HEAD_BYTES = 4096
"""Of a head at most so much is read."""
_REASON_CHARACTERS = 500
_NUMBERS, _SCORES = 32, 4
_SHAPE_CHARACTERS = 64
"""A tensor's shape may take so many characters more in a header than its number of values."""
_LIMIT = 1 << 53
_SHA256 = re.compile("[0-9a-f]{64}")
_ADAPTER, _CONFLICT, _STATE = "adapter/", "conflict/", "regulariser/"


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


def is_name(value: object) -> bool:
    """Whether a value from outside is a name, with which a folder can be made."""
    return isinstance(value, str) and CLIENT_NAME.fullmatch(value) is not None


def is_sha256(value: object) -> bool:
    """Whether a value from outside is a SHA-256, as 64 lower-case hex digits."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


_Count = Annotated[int, Rule("0 or more, below 2^53", lambda value: 0 <= value < _LIMIT)]
_Positive = Annotated[int, Rule("1 or more, below 2^53", lambda value: 0 < value < _LIMIT)]
_Number = Annotated[float, Rule("of at most 2^53", lambda value: abs(value) < _LIMIT)]
_Name = Annotated[str, Rule("a client's name", is_name)]
_Wire = Annotated[str, Choice("fedproxy.encodings")]


@table
class _OrderHead:
    round: _Positive
    voters: _Count
    share: Annotated[float, Rule("from 0 to 1", lambda value: 0 <= value <= 1)]
    wire: _Wire
    since: _Count
    trains: bool
    untuned: bool
    ask: dict[str, Any] | None


@table
class _ScoreHead:
    loss: Annotated[float, Rule("0 or more", lambda value: 0 <= value < _LIMIT)]
    rows: _Positive
    accuracy: Annotated[float, Rule("from 0 to 1", lambda value: 0 <= value <= 1)] | None


@table
class _ReplyHead:
    client: _Name
    round: _Positive
    rows: _Positive
    tokens: _Count
    steps: _Positive
    loss: _Number | None
    seconds: Annotated[float, Rule("0 or more", lambda value: 0 <= value < _LIMIT)]
    numbers: Annotated[dict[str, _Number], Rule(f"{_NUMBERS} numbers at most", lambda value: len(value) <= _NUMBERS)]
    peak_memory: _Count
    wire: _Wire
    epsilon: Annotated[float, Rule("0 or more", lambda value: 0 <= value < _LIMIT)] | None
    validation: Annotated[dict[str, dict[str, Any]], Rule("a few scores", lambda value: len(value) <= _SCORES)]


@table
class _ScoredHead:
    client: _Name
    round: _Positive
    score: dict[str, Any]


@table
class _RefusalHead:
    client: _Name
    round: _Positive
    kind: Literal["declined", "failed"]
    reason: Annotated[str, Rule("short", lambda value: len(value) <= _REASON_CHARACTERS)]


_HEADS: dict[str, type] = {
    "order": _OrderHead,
    "reply": _ReplyHead,
    "scored": _ScoredHead,
    "told": ToldHead,
    "refusal": _RefusalHead,
}
"""The head of each message; its fields are fields of the message's dataclass."""
_ANSWERS = {"train": "reply", "score": "scored", "sum": "told"}
"""What answers an order of each kind."""


def _encode(message: str, head: Mapping[str, object], tensors: Tensors) -> bytes:
    entries = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in sorted(tensors.items())}
    content = b"".join(tensor_bytes(tensors[name].detach().cpu()) for name in entries)
    digest = hashlib.sha256(content).hexdigest()
    whole = {"message": message, "protocol": PROTOCOL, "version": version(), "sha256": digest, **head}
    return header_bytes(entries, {"head": json.dumps(whole, allow_nan=False)}) + content


def _limit(tensors: Mapping[str, tuple[torch.dtype, int]]) -> int:
    """Bytes of the tensors of so many values and their header, and what a head may add, each character escaped."""
    header = header_bytes({name: (DTYPE_NAMES[dtype], (count,)) for name, (dtype, count) in tensors.items()})
    shapes = _SHAPE_CHARACTERS * len(tensors)
    return len(header) + shapes + sum(dtype.itemsize * count for dtype, count in tensors.values()) + 2 * HEAD_BYTES


def _as_sent(
    tensors: Tensors, wire: str, options: Mapping[str, Any], share: float, prefix: str = ""
) -> dict[str, tuple[torch.dtype, int]]:
    """For `_limit`: what comes of tensors of this layout in an encoding, at most."""
    if ENCODINGS.choose(wire).plain:
        return {prefix + name: (tensor.dtype, tensor.numel()) for name, tensor in tensors.items()}
    row, chosen = encoding(wire, options)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return {prefix + name: part for name, part in row.layout(shapes, chosen, share=share).items()}


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


def _head(file: TensorFile, content: memoryview, who: str, *messages: str) -> tuple[str, dict[str, Any]]:
    """The checked head of a message: which of `messages` it is, and its fields.

    Args:
        file: Its header.
        content: The bytes of its tensors.
        who: Whose it is, for the error.
        *messages: What is expected.

    Raises:
        ArtifactError: it is none of them, of another protocol, a field is missing, unknown or impossible, or the bytes
            are not those that were sent.
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
    digest = head.pop("sha256", None)
    if digest != hashlib.sha256(content).hexdigest():
        raise ArtifactError(f"{who}: the content is damaged: its SHA-256 is not the one in the head.")
    problems: list[str] = []
    fields: object = read_table(_HEADS[message], head, "", problems)
    if problems:
        raise ArtifactError(f"{who}, head of the {message}: {problems[0]:.200}")
    return message, vars(fields)


def encode_order(order: Order) -> bytes:
    """The bytes of an order.

    The conflict goes as its level K − |Σ sign| in as many bits as K needs; level / K in float32 is the conflict again,
    to the bit.
    """
    adapter, wire = (order.parcel.parts, order.parcel.encoding) if order.parcel else (order.adapter, PLAIN)
    tensors = {_ADAPTER + name: tensor for name, tensor in adapter.items()}
    tensors |= {_STATE + name: tensor for name, tensor in (order.state or {}).items()}
    for name, values in (order.conflict or {}).items():
        levels = (values * order.voters).round().to(torch.int32)
        if not torch.equal(levels.float() / order.voters, values):
            raise AssertionError(f"the conflict of {name} is no multiple of 1/{order.voters}")
        tensors[_CONFLICT + name] = pack_levels(levels, order.voters)
    asked, parts = (None, {}) if order.ask is None else ask_parts(order.ask)
    return _encode("order", _fields(order, "order", wire=wire, ask=asked), tensors | parts)


def order_limit(adapter: Tensors, wire: str = PLAIN, *, secure: bool = False) -> int:
    """The most bytes that an order for an adapter of this layout takes; a client counts before it keeps any."""
    layout = _as_sent(adapter, wire, {}, 1.0, _ADAPTER)
    layout |= letters_size(MOST_MEMBERS) if secure else {}
    layout |= {_STATE + name: (torch.float32, tensor.numel()) for name, tensor in adapter.items()}
    layout |= {_CONFLICT + name: (torch.uint16, tensor.numel()) for name, tensor in adapter.items()}
    return _limit(layout)


def decode_order(data: bytes, start: Tensors | None = None, wire: str = PLAIN) -> Order:
    """The order that `encode_order` made.

    Args:
        data: The bytes.
        start: The adapter that the run began with, as far as it is trained: what an encoded one is counted from.
        wire: The encoding of adapters that was offered.

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
        _, head = _head(read_header(path), _content(data), who, "order")
        tensors = load_tensors(path)
    adapter, conflict, state = (_under(prefix, tensors) for prefix in (_ADAPTER, _CONFLICT, _STATE))
    asked = {name: tensor for name, tensor in tensors.items() if name.startswith((LETTER, COUNTS))}
    if len(adapter) + len(conflict) + len(state) + len(asked) * (head["ask"] is not None) < len(tensors):
        raise ArtifactError(f"{who}: a tensor belongs neither to the adapter nor to the conflict or the state.")
    ask = None if head["ask"] is None else read_ask(head["ask"], asked, who)
    if ask is not None and not head["trains"]:
        if adapter or conflict or state:
            raise ArtifactError(f"{who}: it asks for {ask.step}, and holds an adapter.")
        return Order(head["round"], {}, trains=False, ask=ask)
    if head["since"] >= head["round"]:
        raise ArtifactError(f"{who}: it goes on from round {head['since']}, and is of round {head['round']}.")
    if head["wire"] != wire:
        raise ArtifactError(f"{who}: the adapter came as {head['wire']}; {wire} was offered.")
    if start is not None and not ENCODINGS.choose(wire).plain:
        adapter = open_adapter(Parcel(wire, {}, 1.0, adapter), start, who)
    if not adapter or not all(tensor.is_floating_point() for tensor in adapter.values()):
        raise ArtifactError(f"{who}: the adapter is empty, or not floating point.")
    check_finite(adapter, who)
    if state:
        if {name: (t.shape, t.dtype) for name, t in state.items()} != {
            name: (t.shape, torch.float32) for name, t in adapter.items()
        }:
            raise ArtifactError(f"{who}: the state of the regulariser has another layout than the adapter.")
        check_finite(state, who)
    voters = head["voters"]
    if bool(conflict) != bool(voters) or (conflict and conflict.keys() != adapter.keys()):
        raise ArtifactError(f"{who}: {voters} voters, and a conflict of {len(conflict)} of {len(adapter)} tensors.")
    shares = {
        name: unpack_levels(packed, adapter[name].shape, voters, f"{who}: the conflict of {name}").float() / voters
        for name, packed in conflict.items()
    }
    return Order(
        head["round"],
        adapter,
        shares or None,
        voters,
        state or None,
        float(head["share"]),
        since=head["since"],
        trains=head["trains"],
        untuned=head["untuned"],
        ask=ask,
    )


def _content(data: bytes) -> memoryview:
    """The bytes of a message's tensors, behind its header."""
    return memoryview(data)[8 + int.from_bytes(data[:8], "little") :]


def _under(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def encode_reply(answer: Answer) -> bytes:
    """The bytes of a client's reply, of its score, or of its refusal (of kind "declined" or "failed")."""
    if isinstance(answer, Refusal):
        return _encode("refusal", _fields(answer, "refusal", reason=answer.reason[:_REASON_CHARACTERS]), {})
    if isinstance(answer, Scored):
        return _encode("scored", _fields(answer, "scored", score=dataclasses.asdict(answer.score)), {})
    if isinstance(answer, Told):
        return _encode("told", _fields(answer, "told"), {**letter_tensors(answer.letters), **answer.words})
    scores = {name: dataclasses.asdict(score) for name, score in answer.validation.items()}
    tensors = answer.parcel.parts if answer.parcel else answer.update
    return _encode("reply", _fields(answer, "reply", validation=scores), tensors)


def _fields(said: Answer | Order, message: str, **given: object) -> dict[str, object]:
    """The head of a message: those fields of it that are given, and the others as they are."""
    names = (field.name for field in dataclasses.fields(_HEADS[message]))
    return {name: given[name] if name in given else getattr(said, name) for name in names}


def _score(values: dict[str, Any], who: str) -> Score:
    """A score that came.

    Raises:
        ArtifactError: it is none.
    """
    problems: list[str] = []
    found = read_table(_ScoreHead, values, "", problems)
    if problems:
        raise ArtifactError(f"{who}, a score: {problems[0]:.200}")
    return Score(**vars(found))


def reply_limit(order: Order, wire: str = PLAIN, options: Mapping[str, Any] | None = None) -> int:
    """The most bytes that a reply to `order` takes, plain or encoded: its exact size, and a few KiB for the head."""
    if order.kind == "score":
        return _limit({})
    if order.ask is not None:
        words = 2 * parameter_count(order.adapter) or (0 if order.ask.counts is None else order.ask.counts.numel())
        return _limit({WORDS: (torch.uint32, words)} | letters_size(len(order.ask.letters) or 1))
    return max(_limit(_as_sent(order.adapter, name, options or {}, order.share)) for name in {PLAIN, wire})


def answer_limit(adapter: Tensors, federate: Federate) -> int:
    """The most bytes that any answer in a federation takes, for an adapter of this layout."""
    plain = reply_limit(Order(1, adapter), federate.wire, federate.wire_options)
    if not federate.secure:
        return plain
    return max(plain, reply_limit(Order(1, adapter, ask=Ask("mask"))), _limit(letters_size(MOST_MEMBERS)))


def read_reply(
    path: Path, data: bytes, who: str, order: Order, wire: str = PLAIN, options: Mapping[str, Any] | None = None
) -> Answer:
    """Read an answer that lies in a file. The update stays on disk: it is mapped, and judged by the coordinator.

    Masked words are read, since the coordinator adds them up and lets them go.

    Args:
        path: The file; beside it an encoded update is decoded, and then it is removed.
        data: Its bytes.
        who: Whose answer it is, for the error.
        order: The order that it answers, whose adapter's layout an encoded update has.
        wire: The encoding that was offered; a plain update is welcome at any time.
        options: Its options.

    Raises:
        ArtifactError: the bytes are no answer, of another protocol, or the head holds something impossible.
        UsageError, ResourceError: the decoded update cannot be written.
    """
    try:
        file = read_header(path)
        message, head = _head(file, _content(data), who, _ANSWERS[order.kind], "refusal")
    except ArtifactError as error:
        raise ArtifactError(str(error).replace(str(path), who)) from error
    if message == "told":
        return _told(head, load_tensors(path), who)
    if message != "reply":
        if file.entries:
            raise ArtifactError(f"{who}: it is {message}, and holds tensors.")
        return Refusal(**head) if message == "refusal" else Scored(**{**head, "score": _score(head["score"], who)})
    head["validation"] = {name: _score(values, who) for name, values in head["validation"].items()}
    sent = head.pop("wire")
    if sent not in (PLAIN, wire):
        raise ArtifactError(f"{who}: the update came as {sent}; {wire} was offered.")
    if order.ask is not None:
        words = load_tensors(path)
        check_words(words, who)
        return Reply(update=words, wire=sent, size=size_in_bytes(words), **head)
    if ENCODINGS.choose(sent).plain:
        try:
            update = MappedTensors(path, file.entries)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(str(path), who)) from error
        return Reply(update=update, wire=sent, size=size_in_bytes(update), **head)
    parcel = Parcel(sent, options or {}, order.share, load_tensors(path))
    decoded = path.with_suffix(".decoded")
    layout = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in order.adapter.items()}
    write_tensors(decoded, layout, (tensor for _, tensor in parcel.open(order.adapter, who)))
    path.unlink()
    update = MappedTensors(decoded, read_header(decoded).entries)
    return Reply(update=update, wire=sent, size=size_in_bytes(parcel.parts), **head)


def _told(head: dict[str, Any], tensors: Tensors, who: str) -> Told:
    words = {name: tensor for name, tensor in tensors.items() if not name.startswith(LETTER)}
    check_words(words, who)
    return Told(**head, letters=letters_of(tensors, who), words=words)


def take_reply(
    data: bytes, path: Path, order: Order, sender: str, wire: str = PLAIN, options: Mapping[str, Any] | None = None
) -> Answer:
    """Turn what a client sent in answer to `order` into an answer for the coordinator.

    Args:
        data: The bytes as received.
        path: File of the open round's spool folder to keep them in, for as long as the round is open.
        order: The order that is open.
        sender: The client, as the transport knows it.
        wire: The encoding of updates.
        options: Its options.

    Returns:
        Its reply, score or refusal; a refusal of kind "invalid" if the bytes are too many or cannot be read.

    Raises:
        UsageError, ResourceError: the file cannot be written.
    """
    most = reply_limit(order, wire, options)
    if len(data) > most:
        return Refusal(sender, order.round, f"it sent {len(data)} bytes, a reply takes at most {most}", "invalid")
    try:
        path.write_bytes(data)
    except OSError as error:
        raise os_error(error, path) from error
    try:
        return read_reply(path, data, sender, order, wire, options)
    except ArtifactError as error:
        return Refusal(sender, order.round, str(error), "invalid")
