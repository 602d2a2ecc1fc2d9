"""What orders and answers say of secure sums comes back to the bit; damaged bytes are an ArtifactError and no more."""

import contextlib
import dataclasses
import hashlib
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.errors import ArtifactError
from fedproxy.federation.messages import WORDS, Ask, Order, Refusal, Reply, Told
from fedproxy.federation.protocol import (
    answer_limit,
    decode_order,
    encode_order,
    encode_reply,
    order_limit,
    reply_limit,
    take_reply,
)
from fedproxy.federation.secure.asks import LETTER_BYTES, MOST_MEMBERS
from fedproxy.tensors import parameter_count
from tests.federation.replies import PHI
from tests.federation.secure.party import table

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
LETTERS = st.dictionaries(NAMES, st.binary(max_size=40), max_size=5)
COUNTS = st.lists(st.integers(0, 2**32 - 1), max_size=9).map(lambda values: torch.tensor(values, dtype=torch.uint32))
LABELS = st.sampled_from(["", "values", "positive"])
STEPS = st.sampled_from(["advertise", "share", "mask", "agree", "reveal"])
FLOATS = st.floats(-(2.0**53), 2.0**53)
ASKS = st.builds(
    Ask,
    step=STEPS,
    attempt=st.integers(0, 2**31 - 1),
    label=LABELS,
    threshold=st.integers(0, MOST_MEMBERS),
    top=FLOATS,
    usual=FLOATS,
    letters=LETTERS,
    counts=st.none() | COUNTS,
)
NUMBERS = st.dictionaries(st.sampled_from(["rows", "agreement"]), st.floats(-1e15, 1e15), max_size=2)
TOLD = st.builds(
    Told,
    client=NAMES,
    round=st.integers(1, 2**53 - 1),
    step=STEPS,
    label=LABELS,
    letters=LETTERS,
    words=st.just({}) | COUNTS.map(lambda words: {WORDS: words}),
    numbers=NUMBERS,
)


def same(one, other):
    tensors = [(name, getattr(one, name)) for name in ("counts", "words") if hasattr(one, name)]
    for name, tensor in tensors:
        theirs = getattr(other, name)
        mine, theirs = (each.get(WORDS) if isinstance(each, dict) else each for each in (tensor, theirs))
        assert (mine is None) == (theirs is None)
        assert mine is None or (torch.equal(mine, theirs) and mine.dtype == theirs.dtype)
    without = {name: None for name, _ in tensors}
    assert dataclasses.replace(one, **without) == dataclasses.replace(other, **without)


@settings(max_examples=60, deadline=None)
@given(ASKS, st.integers(1, 2**53 - 1), st.booleans())
def test_an_order_comes_back_to_the_bit(ask, number, trains):
    order = Order(number, PHI if trains else {}, trains=trains, ask=ask)
    data = encode_order(order)
    back = decode_order(data)
    same(back.ask, ask)
    assert (back.round, back.trains, back.kind) == (number, trains, "train" if trains else "sum")
    assert back.adapter.keys() == order.adapter.keys()
    assert encode_order(back) == data


@settings(max_examples=60, deadline=None)
@given(TOLD)
def test_an_answer_comes_back_to_the_bit(tmp_path_factory, told):
    data = encode_reply(told)
    ask = Ask(told.step, letters=dict.fromkeys(map(str, range(6)), b""), counts=torch.zeros(9, dtype=torch.uint32))
    order = Order(told.round, {}, trains=False, ask=ask)
    back = take_reply(data, tmp_path_factory.mktemp("spool") / "1", order, told.client)
    same(back, told)
    assert encode_reply(back) == data


def test_the_largest_order_and_answers_are_within_the_limits():
    letters = {f"{number:064d}": bytes(LETTER_BYTES) for number in range(MOST_MEMBERS)}
    words = torch.zeros(3, dtype=torch.uint32)
    for trains in (False, True):
        ask = Ask("mask", 2**31 - 1, "values", MOST_MEMBERS, -(2.0**53), 1 / 3, letters)
        conflict = {name: torch.ones_like(tensor) for name, tensor in PHI.items()}
        train = {"adapter": PHI, "conflict": conflict, "voters": 255, "state": PHI} if trains else {"adapter": {}}
        assert len(encode_order(Order(1, trains=trains, ask=ask, **train))) <= order_limit(PHI, secure=True)
    counts = Ask("mask", label="values", counts=words)
    assert len(encode_order(Order(1, {}, trains=False, ask=counts))) <= order_limit(PHI, secure=True)
    share = Order(1, {}, trains=False, ask=Ask("share", letters=letters))
    dealt = Told("x" * 64, 2**53 - 1, "share", letters=dict(list(letters.items())[1:]))
    assert len(encode_reply(dealt)) <= reply_limit(share)
    values = Order(1, {}, trains=False, ask=counts)
    told = Told("x" * 64, 2**53 - 1, "mask", "values", words={WORDS: words}, numbers={"agreement": -1 / 3})
    assert len(encode_reply(told)) <= reply_limit(values)
    both = {WORDS: torch.zeros(2 * parameter_count(PHI), dtype=torch.uint32)}
    trained = Reply("x" * 64, 1, both, rows=1, tokens=1, steps=1, loss=1.0, seconds=1.0)
    most = reply_limit(Order(1, PHI, ask=Ask("mask", letters=letters)))
    assert len(encode_reply(trained)) <= most
    assert len(encode_reply(trained)) <= answer_limit(PHI, table())


def test_one_byte_more_than_the_limit_is_not_read(tmp_path):
    order = Order(1, {}, trains=False, ask=Ask("agree", letters={"x": b"", "y": b""}))
    data = encode_reply(Told("x", 1, "agree", letters={"x": b"signed"}))
    much = data + bytes(reply_limit(order) - len(data) + 1)
    refused = take_reply(much, tmp_path / "1", order, "x")
    assert (type(refused), refused.kind) == (Refusal, "invalid")
    assert not (tmp_path / "1").exists()


def head(data, **fields):
    """The message with other fields in its head; `...` takes one out."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    found = {**json.loads(header["__metadata__"]["head"]), **fields}
    header["__metadata__"]["head"] = json.dumps({key: value for key, value in found.items() if value is not ...})
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def renamed(data, old, new):
    """The message with a tensor of another name."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[new] = header.pop(old)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


ASK = Ask("mask", 1, "values", 3, letters={"x": b"abc", "y": b""}, counts=torch.arange(4).to(torch.uint32))
ORDER = encode_order(Order(2, {}, trains=False, ask=ASK))
GIVEN = json.loads(json.loads(ORDER[8 : 8 + struct.unpack("<Q", ORDER[:8])[0]])["__metadata__"]["head"])["ask"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        *((head(ORDER, ask={**GIVEN, key: value}), f"ask.*{key}") for key, value in (
            ("step", "steal"), ("attempt", -1), ("label", "x" * 21), ("label", "a b"), ("threshold", 256),
            ("top", 1e300), ("usual", "much"), ("more", 1),
        )),
        (head(ORDER, ask=None), "neither"),
        (head(ORDER, ask=[]), "ask"),
        (head(ORDER, ask={}), "ask"),
        (renamed(ORDER, "letter/x", "letter/../x"), "no client's name"),
        (renamed(ORDER, "counts/words", "counts/other"), "no masked words"),
        (renamed(ORDER, "counts/words", "letter/z"), "letter of 'z'"),
        (renamed(ORDER, "letter/x", "adapter/x"), "holds an adapter"),
        (renamed(ORDER, "letter/x", "other"), "neither"),
        (encode_order(Order(2, {}, trains=False, ask=Ask("agree", letters={"x": bytes(LETTER_BYTES + 1)}))), "letter"),
        (
            encode_order(
                Order(2, {}, trains=False, ask=Ask("agree", letters={str(k): b"" for k in range(MOST_MEMBERS + 1)}))
            ),
            "256 letters",
        ),
    ],
)  # fmt: skip
def test_a_bad_order_is_refused(data, says):
    with pytest.raises(ArtifactError, match=says):
        decode_order(data)


TOLD_ORDER = Order(2, {}, trains=False, ask=ASK)
GOOD = encode_reply(
    Told("x", 2, "mask", "values", {"x": b"abc"}, {WORDS: torch.arange(4).to(torch.uint32)}, {"agreement": 0.5})
)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (head(GOOD, numbers={"agreement": 1e300}), "numbers"),
        (head(GOOD, numbers={"loss": 1.0}), "numbers"),
        (head(GOOD, numbers=[]), "numbers"),
        (head(GOOD, step="steal"), "step"),
        (head(GOOD, client=7), "client"),
        (head(GOOD, client="../x"), "client"),
        (head(GOOD, round=0), "round"),
        (head(GOOD, round=...), "round"),
        (renamed(GOOD, WORDS, "adapter"), "no masked words"),
        (renamed(GOOD, "letter/x", "letter/"), "no client's name"),
        (renamed(GOOD, WORDS, "letter/y"), "letter of 'y'"),
        (encode_reply(Reply("x", 2, PHI, 1, 1, 1, 1.0, 1.0)), "expected told or refusal"),
    ],
)
def test_a_bad_answer_is_its_senders_fault(tmp_path, data, says):
    said = take_reply(data, tmp_path / "1", TOLD_ORDER, "x")
    assert (type(said), said.client, said.kind) == (Refusal, "x", "invalid")
    assert says in said.reason
    assert str(tmp_path) not in said.reason


def test_a_plain_update_is_no_answer_to_an_order_with_secure_sums(tmp_path):
    order = Order(2, PHI, ask=ASK)
    said = take_reply(encode_reply(Reply("x", 2, PHI, 1, 1, 1, 1.0, 1.0)), tmp_path / "1", order, "x")
    assert (type(said), said.kind) == (Refusal, "invalid")
    assert "no masked words" in said.reason


def rehashed(data):
    """The message with the hash of its content in its head, so that more than the hash is tried."""
    with contextlib.suppress(Exception):
        (length,) = struct.unpack("<Q", data[:8])
        return head(data, sha256=hashlib.sha256(data[8 + length :]).hexdigest())
    return data


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_whatever_is_wrong_with_bytes_is_an_artifact_error(tmp_path_factory, changes, hashed):
    spool = tmp_path_factory.getbasetemp() / "mutated"
    for kind, whole in (("order", ORDER), ("told", GOOD)):
        data = bytearray(whole)
        for place, value in changes:
            data[place % len(data)] = value
        mutated = rehashed(bytes(data)) if hashed else bytes(data)
        if kind == "order":
            with contextlib.suppress(ArtifactError):
                decode_order(mutated)
        else:
            assert isinstance(take_reply(mutated, spool, TOLD_ORDER, "x"), Told | Refusal)
