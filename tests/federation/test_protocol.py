import dataclasses
import hashlib
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.aggregation.analyse import conflict
from fedproxy.errors import ArtifactError
from fedproxy.federation import protocol
from fedproxy.federation.messages import Order, Refusal, Reply
from fedproxy.federation.protocol import (
    PROTOCOL,
    decode_order,
    encode_order,
    encode_reply,
    order_limit,
    read_reply,
    reply_limit,
    take_reply,
)
from fedproxy.tensor_files import DTYPE_NAMES, header_bytes, tensor_bytes
from fedproxy.tensors import MappedTensors
from tests.federation.replies import PHI, reply, update

NAME = "base.layers.0/weird name"
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@st.composite
def tensors(draw):
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    layout = draw(st.dictionaries(st.text("ab./ü", min_size=1, max_size=6), st.tuples(shapes, DTYPES), min_size=1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in layout.items()}


def same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@settings(max_examples=40, deadline=None)
@given(tensors(), st.integers(1, 300), st.integers(1, 10**6))
def test_an_order_comes_back_to_the_bit(adapter, voters, number):
    generator = torch.Generator().manual_seed(voters)
    levels = {name: torch.randint(0, voters + 1, t.shape, generator=generator) for name, t in adapter.items()}
    shares = {name: level.float() / voters for name, level in levels.items()}
    data = encode_order(Order(number, adapter, shares, voters))
    order = decode_order(data)
    assert (order.round, order.voters) == (number, voters)
    assert same(order.adapter, adapter)
    assert same(order.conflict, shares)
    assert len(data) <= order_limit(adapter)
    assert encode_order(order) == data


@pytest.mark.parametrize("voters", [1, 2, 3, 7, 100, 255, 256, 1000])
def test_every_conflict_that_the_analysis_can_give_survives(voters):
    """Coordinate p has p clients that go up; the others go down."""
    updates = [{"w": torch.tensor([1.0 if k < p else -1.0 for p in range(voters + 1)])} for k in range(voters)]
    shares = conflict(updates)
    data = encode_order(Order(2, {"w": torch.zeros(voters + 1)}, shares, voters))
    assert torch.equal(decode_order(data).conflict["w"], shares["w"])
    assert len(data) <= 4 * (voters + 1) + math.ceil((voters + 1) * voters.bit_length() / 8) + 600


def test_an_order_says_which_update_counted_last():
    assert [decode_order(encode_order(Order(7, PHI, since=since))).since for since in (0, 6)] == [0, 6]


def test_the_first_order_has_no_conflict():
    order = decode_order(encode_order(Order(1, PHI, None)))
    assert (order.conflict, order.voters) == (None, 0)
    assert same(order.adapter, PHI)


@settings(max_examples=40, deadline=None)
@given(
    tensors(),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    st.lists(st.integers(1, 2**53 - 1), min_size=4, max_size=4),
    st.lists(st.floats(0, 1e9), min_size=2, max_size=2),
)
def test_a_reply_comes_back_to_the_bit(tmp_path_factory, values, name, counts, floats):
    given = Reply(name, counts[0], values, counts[1], counts[2], counts[3], floats[0], floats[1])
    data = encode_reply(given)
    path = tmp_path_factory.mktemp("spool") / "1"
    back = take_reply(data, path, Order(counts[0], values, None), name)
    assert isinstance(back.update, MappedTensors)
    assert same(back.update, values)
    assert dataclasses.replace(back, update=values) == given
    assert len(data) <= reply_limit(Order(1, values, None))
    assert encode_reply(back) == data


@pytest.mark.parametrize("kind", ["declined", "failed"])
def test_a_refusal_comes_back(tmp_path, kind):
    given = Refusal("x", 3, "max_steps: é\n" + "!" * 600, kind)
    data = encode_reply(given)
    assert len(data) <= reply_limit(Order(3, PHI, None))
    assert take_reply(data, tmp_path / "1", Order(3, PHI, None), "x") == dataclasses.replace(
        given, reason=given.reason[:500]
    )


def test_the_longest_refusal_fits_the_smallest_order(tmp_path):
    given = Refusal("x" * 64, 2**53 - 1, "\U0001f9ea\x00\\" * 200, "declined")
    order = Order(2**53 - 1, {"w": torch.zeros(1)}, None)
    assert take_reply(encode_reply(given), tmp_path / "1", order, "x") == dataclasses.replace(
        given, reason=given.reason[:500]
    )


@pytest.mark.parametrize("theirs", [PROTOCOL + 1, None, True, "1"])
def test_another_version_is_told_so(tmp_path, theirs, monkeypatch):
    monkeypatch.setattr(protocol, "PROTOCOL", theirs)
    monkeypatch.setattr(protocol, "version", lambda: "9.9")
    order, answer = encode_order(Order(1, PHI, None)), encode_reply(reply("x"))
    monkeypatch.undo()
    says = rf"protocol {theirs!r} \(fedproxy '9\.9'\), this side protocol {PROTOCOL} \(fedproxy '0\.\d+.*same version"
    with pytest.raises(ArtifactError, match="the order speaks " + says):
        decode_order(order)
    (tmp_path / "1").write_bytes(answer)
    with pytest.raises(ArtifactError, match="x speaks " + says):
        read_reply(tmp_path / "1", answer, "x", Order(1, PHI))


def order_bytes(tensors=None, **head):
    tensors = {"adapter/w": torch.zeros(2), "conflict/w": torch.tensor([0b0110], dtype=torch.uint8), **(tensors or {})}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    content = b"".join(bytes(tensor_bytes(tensor)) for tensor in tensors.values())
    whole = {"message": "order", "protocol": PROTOCOL, "version": "1", "sha256": hashlib.sha256(content).hexdigest()}
    whole |= {"round": 2, "voters": 2, "share": 1.0, "wire": "fp32", "since": 1, "trains": True, "untuned": False}
    whole |= {"ask": None}
    whole |= head
    header = header_bytes(
        {n: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()}, {"head": json.dumps(whole)}
    )
    return header + content


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "truncated"),
        (order_bytes()[:-1], "truncated"),
        (order_bytes(round=0), "round = 0"),
        (order_bytes(round=True), "round = True"),
        (order_bytes(voters=-1), "voters = -1"),
        (order_bytes(voters=0), "0 voters, and a conflict of 1"),
        (order_bytes({"conflict/w": None}), "2 voters, and a conflict of 0"),
        (order_bytes({"conflict/v": torch.zeros(1, dtype=torch.uint8)}), "a conflict of 2 of 1"),
        (order_bytes({"conflict/w": torch.tensor([0b0011], dtype=torch.uint8)}), "the conflict of w"),
        (order_bytes({"conflict/w": torch.zeros(1, dtype=torch.uint16)}), "the conflict of w"),
        (order_bytes({"conflict/w": torch.zeros(2, dtype=torch.uint8)}), "the conflict of w"),
        (order_bytes({"regulariser/w": torch.zeros(3)}), "regulariser has another layout"),
        (order_bytes({"regulariser/w": torch.zeros(2, dtype=torch.float16)}), "regulariser has another layout"),
        (order_bytes({"regulariser/w": torch.tensor([0, math.inf])}), "Inf"),
        (order_bytes(sha256="0" * 64), "the content is damaged"),
        (order_bytes()[:-1] + b"\x01", "the content is damaged"),
        (order_bytes(share=1.5), "share = 1.5"),
        (order_bytes(wire="int4"), "came as int4; fp32 was offered"),
        (order_bytes(wire="int3"), "wire = 'int3'"),
        (order_bytes({"adapter/w": torch.zeros(2, dtype=torch.int64)}), "not floating point"),
        (order_bytes({"adapter/w": torch.tensor([0, math.nan])}), "NaN"),
        (order_bytes({"other": torch.zeros(2)}), "neither"),
        (order_bytes(since=-1), "since = -1"),
        (order_bytes(trains=1), "trains = 1"),
        (order_bytes(untuned="no"), "untuned = 'no'"),
        (order_bytes(since=2), "goes on from round 2, and is of round 2"),
        (order_bytes(extra=1), "extra"),
        (encode_reply(reply("x")), "'reply', expected order"),
    ],
)
def test_a_bad_order_is_refused(data, says):
    with pytest.raises(ArtifactError, match=says):
        decode_order(data)


def test_a_conflict_that_is_no_multiple_is_a_bug():
    with pytest.raises(AssertionError, match="no multiple of 1/2"):
        encode_order(Order(2, PHI, update(0.5, 0.5, 0.3), 2))


def test_a_plain_reply_is_within_the_limit_whatever_encoding_and_options_were_offered():
    order = Order(1, PHI, share=0.5)
    data = encode_reply(reply("x"))
    assert len(data) <= reply_limit(order, "top-k", {"values": "int4"})
