"""Replies made to do harm: none reaches the merge, and the round goes on with the rest.

Each attack is a row: its name → a function that gives the bytes that client "evil" sends instead of its honest reply.
They go the way of any reply: spooled to a file, read, judged by the coordinator.
"""

import dataclasses
import hashlib
import json
import math
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedproxy.aggregation.merge import merge
from fedproxy.config import Federate
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.messages import Closed, Refusal, Reply, Score, Scored
from fedproxy.federation.parcel import wrap_update
from fedproxy.federation.protocol import PROTOCOL, encode_reply, take_reply
from fedproxy.tensors import Tensors

HONEST = ("bank", "clinic", "shop")
PHI: Tensors = {"a": torch.ones(40, 3), "b": torch.zeros(7)}
Attack = Callable[[Reply], bytes]


def honest(client: str, round: int = 1) -> Reply:
    generator = torch.Generator().manual_seed(round * 1000 + sum(client.encode()))
    update = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in PHI.items()}
    return Reply(client, round, update, rows=10, tokens=100, steps=3, loss=1.5, seconds=2.0)


def _update(change: Callable[[dict[str, torch.Tensor]], Any]) -> Attack:
    def attack(reply: Reply) -> bytes:
        update = {name: tensor.clone() for name, tensor in reply.update.items()}
        change(update)
        return encode_reply(dataclasses.replace(reply, update=update))

    return attack


def _value(value: float) -> Attack:
    return _update(lambda update: update["a"].view(-1).__setitem__(17, value))


def _raw_head(text: str) -> Attack:
    """The reply with another text for a head; SHA256 stands for the hash of its content."""

    def attack(reply: Reply) -> bytes:
        data = encode_reply(reply)
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        digest = hashlib.sha256(data[8 + length :]).hexdigest()
        header["__metadata__"]["head"] = text.replace("SHA256", digest)
        changed = json.dumps(header).encode()
        return struct.pack("<Q", len(changed)) + changed + data[8 + length :]

    return attack


def _head(**fields: Any) -> Attack:
    """The reply with other fields in its head; `...` takes one out."""

    def attack(reply: Reply) -> bytes:
        data = encode_reply(reply)
        (length,) = struct.unpack("<Q", data[:8])
        head = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["head"])
        head = {key: value for key, value in {**head, **fields}.items() if value is not ...}
        return _raw_head(json.dumps(head))(reply)

    return attack


def _declares(elements: int) -> Attack:
    """The honest bytes, but the header declares a tensor of so many float32 values."""

    def attack(reply: Reply) -> bytes:
        data = encode_reply(reply)
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header["b"] = {"dtype": "F32", "shape": [elements], "data_offsets": [480, 480 + 4 * elements]}
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return attack


def _cut(where: Callable[[int, int], int]) -> Attack:
    """The first bytes of the honest reply: how many, given the length of the header and of everything."""

    def attack(reply: Reply) -> bytes:
        data = encode_reply(reply)
        (length,) = struct.unpack("<Q", data[:8])
        return data[: where(8 + length, len(data))]

    return attack


class _Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("pickle-was-run",)


ATTACKS: dict[str, Attack] = {
    "NaN": _value(math.nan),
    "Inf": _value(math.inf),
    "minus Inf": _value(-math.inf),
    "1e30": _value(1e30),
    "everything times a thousand": _update(lambda update: [tensor.mul_(1000) for tensor in update.values()]),
    "largest float": _update(lambda update: update["a"].fill_(3.4e38)),
    "wrong key": _update(lambda update: update.update({"c": update.pop("b")})),
    "missing tensor": _update(lambda update: update.pop("b")),
    "no tensor": _update(dict.clear),
    "extra tensor": _update(lambda update: update.update({"c": torch.zeros(1)})),
    "large extra tensor": _update(lambda update: update.update({"c": torch.zeros(100_000)})),
    "wrong shape": _update(lambda update: update.update({"a": torch.zeros(3, 40)})),
    "other number of dimensions": _update(lambda update: update.update({"a": torch.zeros(120)})),
    "empty tensor": _update(lambda update: update.update({"b": torch.zeros(0)})),
    "half precision": _update(lambda update: update.update({"b": update["b"].half()})),
    "double precision": _update(lambda update: update.update({"b": update["b"].double()})),
    "integers": _update(lambda update: update.update({"b": update["b"].long()})),
    "10 GB declared": _declares(10 << 28),
    "2**62 values declared": _declares(1 << 62),
    "a value fewer declared": _declares(6),
    "nothing": lambda reply: b"",
    "one byte": _cut(lambda header, whole: 1),
    "cut in the length": _cut(lambda header, whole: 7),
    "cut after the length": _cut(lambda header, whole: 8),
    "cut in the header": _cut(lambda header, whole: header // 2),
    "cut before the data": _cut(lambda header, whole: header),
    "cut in a value": _cut(lambda header, whole: header + 2),
    "cut between tensors": _cut(lambda header, whole: header + 480),
    "last byte missing": _cut(lambda header, whole: whole - 1),
    "a byte more": lambda reply: encode_reply(reply) + b"\0",
    "100 MB of zeros": lambda reply: bytes(100 << 20),
    "twice in one": lambda reply: encode_reply(reply) * 2,
    "pickle": lambda reply: pickle.dumps(_Payload()),
    "zip": lambda reply: b"PK\x03\x04" + bytes(100),
    "header of 2**64 - 1 bytes": lambda reply: b"\xff" * 8 + encode_reply(reply)[8:],
    "of the next round": lambda reply: encode_reply(dataclasses.replace(reply, round=2)),
    "under another's name": lambda reply: encode_reply(dataclasses.replace(reply, client="bank")),
    "under a stranger's name": lambda reply: encode_reply(dataclasses.replace(reply, client="stranger")),
    "name as path": _head(client="../../etc/passwd"),
    "name of a million letters": _head(client="a" * 1_000_000),
    "name as list": _head(client=["evil"]),
    "name missing": _head(client=...),
    "unknown field": _head(trusted=True),
    "round as text": _head(round="1"),
    "round as boolean": _head(round=True),
    "round as float": _head(round=1.0),
    "negative round": _head(round=-1),
    "rows as boolean": _head(rows=True),
    "no rows": _head(rows=0),
    "negative rows": _head(rows=-10),
    "rows as float": _head(rows=10.5),
    "rows of a hundred digits": _head(rows=10**100),
    "rows of 2**53": _head(rows=2**53),
    "no steps": _head(steps=0),
    "negative tokens": _head(tokens=-1),
    "loss as NaN": _head(loss=math.nan),
    "loss as Inf": _head(loss=math.inf),
    "loss as text": _head(loss="1.5"),
    "loss of 1e300": _head(loss=1e300),
    "loss as null": _head(loss=None),
    "loss that overflows": _raw_head('{"message":"reply","protocol":2,"version":"0","sha256":"SHA256","loss":1e999}'),
    "negative seconds": _head(seconds=-1),
    "seconds as boolean": _head(seconds=False),
    "another protocol": _head(protocol=PROTOCOL + 1),
    "protocol as boolean": _head(protocol=True),
    "version as table": _head(protocol=PROTOCOL + 1, version={"a": ["b"] * 100}),
    "damaged content": lambda reply: encode_reply(reply)[:-1] + b"\x3e",
    "another's hash": _head(sha256="0" * 64),
    "no hash": _head(sha256=...),
    "hash as number": _head(sha256=5),
    "encoding that was not offered": _head(wire="int4"),
    "encoding that is none": _head(wire="int3"),
    "encoding as list": _head(wire=["fp32"]),
    "numbers that nobody asked for": _head(numbers={"rate_sum": 1.0}),
    "numbers as list": _head(numbers=[1.0]),
    "a number as text": _head(numbers={"rate_sum": "1"}),
    "a number as NaN": _head(numbers={"rate_sum": math.nan}),
    "a number of 1e300": _head(numbers={"rate_sum": 1e300}),
    "a table of numbers": _head(numbers={"rate_sum": {"a": 1.0}}),
    "a hundred numbers": _head(numbers={str(n): 1.0 for n in range(100)}),
    "memory as float": _head(peak_memory=1.5),
    "no table of scores": _head(validation=[1.0]),
    "scores that nobody asked for": _head(validation={"own": {"loss": 1.0, "rows": 1, "accuracy": None}}),
    "a score as number": _head(validation={"own": 1.0}),
    "a score as NaN": _head(validation={"own": {"loss": math.nan, "rows": 1, "accuracy": None}}),
    "a score of 1e300": _head(validation={"own": {"loss": 1e300, "rows": 1, "accuracy": None}}),
    "a score without rows": _head(validation={"own": {"loss": 1.0, "accuracy": 0.5}}),
    "an accuracy of 2": _head(validation={"own": {"loss": 1.0, "rows": 1, "accuracy": 2.0}}),
    "a hundred scores": _head(validation={str(n): {"loss": 1.0, "rows": 1, "accuracy": None} for n in range(100)}),
    "a score in place of an update": lambda reply: encode_reply(Scored("evil", 1, Score(1.0, 1))),
    "an order": _head(message="order"),
    "message as list": _head(message=["reply"]),
    "refusal with tensors": _raw_head(
        '{"message":"refusal","protocol":2,"version":"0","sha256":"SHA256","client":"evil","round":1,"kind":"failed","reason":"x"}'
    ),
    "refusal that says invalid": _raw_head(
        '{"message":"refusal","protocol":2,"version":"0","sha256":"SHA256","client":"evil","round":1,"kind":"invalid","reason":"x"}'
    ),
    "head that is no table": _raw_head("[]"),
    "empty head": _raw_head(""),
    "head that is no JSON": _raw_head("{{"),
    "head with a key twice": _raw_head('{"message":"reply","message":"reply"}'),
    "head nested deeply": _raw_head("[" * 4000),
    "head nested beyond its limit": _raw_head('{"a":' * 300_000),
}


class Server:
    """A coordinator with a spool folder, and whatever was sent to it by bytes."""

    def __init__(self, spool: Path, **settings: Any) -> None:
        self.coordinator = Coordinator(
            [*HONEST, "evil"], PHI, Federate(**{"merge": "h-ties", "quorum": 3, "rounds": 9, **settings})
        )
        self._spool, self._count = spool, 0

    def begin(self) -> None:
        self.coordinator.begin(self.coordinator.clients)
        self.order = self.coordinator.order(HONEST[0])

    def send(self, sender: str, data: bytes) -> str | None:
        self._count += 1
        answer = take_reply(data, self._spool / str(self._count), self.order, sender)
        return self.coordinator.receive(sender, answer)

    def send_honest(self) -> None:
        for name in HONEST:
            assert self.send(name, encode_reply(honest(name, self.order.round))) is None

    def close(self) -> Closed:
        """Close the round, whose merged bits must be those of the honest replies alone."""
        before, number = self.coordinator.adapter, self.order.round
        closed = self.coordinator.close()
        replies = [honest(name, number) for name in HONEST]
        merged, _ = merge([reply.update for reply in replies], "h-ties", rows=[10] * 3, names=list(HONEST))
        assert all(torch.equal(closed.adapter[name], before[name] + merged[name]) for name in PHI)
        assert list(closed.record["clients"]) == list(HONEST)
        json.dumps(closed.record, allow_nan=False)
        return closed


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_it_is_left_out_and_the_round_goes_on(
    attack: str, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spool = tmp_path / "spool"
    spool.mkdir()
    server = Server(spool)
    server.begin()
    if not first:
        server.send_honest()
    server.send("evil", ATTACKS[attack](honest("evil")))
    if first:
        server.send_honest()
    record = server.close().record
    [fault] = record["quarantined"]
    assert (fault["client"], fault["kind"]) == ("evil", "invalid")
    assert 10 < len(fault["reason"]) <= 500
    assert str(tmp_path) not in fault["reason"]
    assert server.coordinator.strikes == {"evil": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["spool"]


@pytest.mark.parametrize("attack", ["10 GB declared", "100 MB of zeros", "2**62 values declared", "head nested deeply"])
def test_what_is_declared_is_not_allocated(attack: str, tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.begin()
    data = ATTACKS[attack](honest("evil"))
    tracemalloc.start()
    server.send("evil", data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1 << 20


def test_every_prefix_is_refused(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.begin()
    data = encode_reply(honest("evil"))
    for length in range(len(data)):
        answer = take_reply(data[:length], tmp_path / "evil", server.order, "evil")
        assert isinstance(answer, Refusal)
        assert answer.kind == "invalid"


def test_a_replayed_reply_counts_once(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.begin()
    server.send_honest()
    assert server.send("bank", encode_reply(honest("bank"))) == "it replied already"
    assert "came under the name 'bank'" in str(server.send("evil", encode_reply(honest("bank"))))
    server.close()
    server.begin()
    for name in (*HONEST, "evil"):  # the round before, all over again
        assert server.send(name, encode_reply(honest(name, 1))) == "it answers round 1, this is round 2"
    server.send_honest()
    record = server.close().record
    assert {fault["kind"] for fault in record["quarantined"]} == {"late"}
    assert record["dropouts"] == ["evil"]
    assert server.coordinator.strikes == {"evil": 1}


def test_who_keeps_attacking_is_not_asked_any_more(tmp_path: Path) -> None:
    server = Server(tmp_path, strikes=3)
    for attack in ("NaN", "1e30", "pickle"):
        server.begin()
        assert "evil" in server.coordinator.asked
        server.send("evil", ATTACKS[attack](honest("evil", server.order.round)))
        server.send_honest()
        server.close()
    server.begin()
    assert server.coordinator.asked == HONEST
    assert server.send("evil", encode_reply(honest("evil", 4))) == "it was not asked in this round"
    server.send_honest()
    server.close()


ENCODED: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = {
    "scale of NaN": ("int4", lambda parts: parts["scales"].__setitem__(0, math.nan)),
    "scale of Inf": ("int4", lambda parts: parts["scales"].__setitem__(1, math.inf)),
    "negative scale": ("int8", lambda parts: parts["scales"].neg_()),
    "scales missing": ("int8", lambda parts: parts.pop("scales")),
    "scales of another type": ("int8", lambda parts: parts.update(scales=parts["scales"].float())),
    "code beyond the levels": ("int8", lambda parts: parts["codes"].__setitem__(0, -128)),
    "nibble beyond the levels": ("int4", lambda parts: parts["codes"].__setitem__(0, 0xFF)),
    "fewer codes": ("int4", lambda parts: parts.update(codes=parts["codes"][:-1])),
    "many codes": ("int4", lambda parts: parts.update(codes=torch.zeros(100_000, dtype=torch.uint8))),
    "another part": ("bf16", lambda parts: parts.update(more=torch.zeros(1))),
    "value of NaN": ("bf16", lambda parts: parts["values"].fill_(math.nan)),
    "counts that lie": ("top-k", lambda parts: parts["counts"].add_(1)),
    "negative counts": ("top-k", lambda parts: parts["counts"].neg_()),
    "positions of nothing": ("top-k", lambda parts: parts["positions"].zero_()),
    "every position": ("top-k", lambda parts: parts["positions"].fill_(255)),
}


@pytest.mark.parametrize("attack", ENCODED)
def test_an_encoded_reply_made_to_do_harm_is_left_out(attack: str, tmp_path: Path) -> None:
    wire, change = ENCODED[attack]
    spool = tmp_path / "spool"
    spool.mkdir()
    server = Server(spool)
    server.begin()
    server.send_honest()
    good = honest("evil")
    parcel, update, _ = wrap_update(good.update, None, wire, {}, seed=1, share=0.5)
    order = dataclasses.replace(server.order, share=0.5)
    fine = take_reply(
        encode_reply(dataclasses.replace(good, parcel=parcel, wire=wire)), spool / "fine", order, "evil", wire
    )
    assert isinstance(fine, Reply)
    assert all(torch.equal(fine.update[name], update[name]) for name in PHI)
    parts = {name: tensor.clone() for name, tensor in parcel.parts.items()}
    change(parts)
    bad = dataclasses.replace(good, parcel=dataclasses.replace(parcel, parts=parts), wire=wire)
    answer = take_reply(encode_reply(bad), spool / "bad", order, "evil", wire)
    assert isinstance(answer, Refusal)
    assert answer.kind == "invalid"
    assert str(tmp_path) not in answer.reason
    assert not (spool / "bad.decoded").exists()
    server.coordinator.receive("evil", answer)
    assert [fault["client"] for fault in server.close().record["quarantined"]] == ["evil"]
