"""What the coordinator sends each client, and what it makes of states, spaces and encodings."""

import dataclasses
import functools
import json
import math

import pytest
import torch

from fedproxy.config import Federate
from fedproxy.federation.coordinator import Coordinator, QuorumError
from fedproxy.federation.protocol import decode_order, encode_order
from tests.federation import replies
from tests.federation.replies import coordinator, reply, take

NAMES = [f"client-{number:02d}" for number in range(20)]


def test_bytes_count_adapter_conflict_levels_and_update():
    server = coordinator()
    for round in (1, 2):
        server.begin("xy")
        take(server, reply("x", round=round))
        record = server.close().record["clients"]["x"]
        assert (record["bytes_up"], record["bytes_down"]) == (12, 12 + 2 * (round - 1))
        # the conflict of one client, a bit each, takes a byte of each tensor


RATES = {"rate_sum": 0.5}


def test_scaffold_sends_the_variate_that_the_replies_made():
    """R = 0.5 a client: after round 1 c is the mean of -τ/R, and φ moves by the mean of τ."""
    server = coordinator(regulariser="scaffold")
    server.begin("xy")
    assert server.order("x").state is None
    take(server, reply("x", 1, 0, 0, numbers=RATES))
    take(server, reply("y", 0, 3, 0, numbers=RATES))
    closed = server.close()
    assert closed.state["a"].tolist() == [-1.0, -3.0]
    server.begin("xy")
    assert torch.equal(server.order("y").state["a"], closed.state["a"])
    assert server.order("y").conflict is None  # nobody looks at it
    resumed = coordinator(regulariser="scaffold", records=[closed.record])
    assert resumed.completed == 1


def test_without_scaffold_there_is_no_variate():
    server = coordinator()
    server.begin("xy")
    take(server, reply("x"))
    take(server, reply("y"))
    assert server.close().state == {}


@pytest.mark.parametrize("rate_sum", [0.0, 1e-30, 1e6])
def test_a_sum_of_learning_rates_that_cannot_be_is_left_out(rate_sum):
    server = coordinator("xyz", regulariser="scaffold")
    server.begin("xyz")
    take(server, reply("x", numbers={"rate_sum": rate_sum}))
    take(server, reply("y", numbers=RATES))
    take(server, reply("z", numbers=RATES))
    closed = server.close()
    assert list(closed.record["clients"]) == ["y", "z"]
    assert closed.state["a"].tolist() == pytest.approx([-4 / 3, -4 / 3])  # of three clients two replied, τ/R = 2


@pytest.mark.parametrize(
    ("regulariser", "numbers"),
    [("scaffold", {}), ("scaffold", {"rate_sum": 0.5, "more": 1.0}), ("fedprox", {"rate_sum": 0.5})],
)
def test_a_reply_has_the_numbers_that_its_regulariser_needs_and_no_others(regulariser, numbers):
    server = coordinator(regulariser=regulariser)
    server.begin("xy")
    assert ", ".join(sorted(numbers)) in take(server, reply("x", numbers=numbers))
    assert server.strikes["x"] == 1


def test_clients_get_one_order_unless_something_differs():
    server = coordinator("xyz")
    server.begin("xyz")
    assert server.order("x") is server.order("y") is server.order("z")


@pytest.mark.parametrize("remembers", [{"wire": "int4"}, {"regulariser": "scaffold"}])
def test_an_order_says_which_of_a_clients_updates_counted_last(remembers):
    """In round 1 y is quarantined, in round 2 x answers too late, and z is asked again after a round without quorum."""
    options = {"rounds": 4, "quorum": 2, **remembers}
    server, records = coordinator("xyz", **options), []
    reply = functools.partial(replies.reply, numbers=RATES if "regulariser" in remembers else {})

    def told(number, **expected):
        resumed = coordinator("xyz", records=json.loads(json.dumps(records)), **options)
        for follower in (server, resumed):
            follower.begin("xyz")
            assert {name: follower.order(name).since for name in "xyz"} == expected
            assert {name: follower.order(name).round for name in "xyz"} == dict.fromkeys("xyz", number)

    told(1, x=0, y=0, z=0)
    for answer in (reply("x"), reply("y", math.nan, 1, 1), reply("z")):
        take(server, answer)
    records.append(server.close().record)
    told(2, x=1, y=0, z=1)
    take(server, reply("y", round=2))
    take(server, reply("z", round=2))
    records.append(server.close().record)
    told(3, x=1, y=2, z=2)
    assert take(server, reply("x", round=2)) is not None
    take(server, reply("z", round=3))
    with pytest.raises(QuorumError):
        server.close()
    told(3, x=1, y=2, z=2)


def test_top_k_sends_each_client_its_retention_of_the_round_before():
    options = {"merge": "h-ties", "merge_options": {"r0": 0.6, "delta": 0.4}, "wire": "top-k"}
    server = coordinator("xyz", **options)
    server.begin("xyz")
    assert {server.order(name).share for name in "xyz"} == {0.6}
    for name, values in (("x", (1, 0, 0)), ("y", (1, 0.1, 0)), ("z", (-1, 0, 3))):
        take(server, reply(name, *values))
    closed = server.close()
    kept = dict(zip(closed.record["analysis"]["names"], closed.record["analysis"]["retention"], strict=True))
    assert kept["z"] < kept["x"] <= 0.6
    resumed = coordinator("xyz", records=[json.loads(json.dumps(closed.record))], **options)
    for follower in (server, resumed):
        follower.begin("xyz")
        assert {name: follower.order(name).share for name in "xyz"} == pytest.approx(kept)


def test_top_k_needs_no_rule_that_retains():
    shares = []
    for merge in ("h-ties", "mean"):
        server = coordinator("xyz", merge=merge, wire="top-k")
        server.begin("xyz")
        for name, values in (("x", (1, 0, 0)), ("y", (1, 0.1, 0)), ("z", (-1, 0, 3))):
            take(server, reply(name, *values))
        record = server.close().record
        for follower in (
            server,
            coordinator("xyz", records=[json.loads(json.dumps(record))], merge=merge, wire="top-k"),
        ):
            follower.begin("xyz")
            shares.append({name: follower.order(name).share for name in "xyz"})
    assert shares == [shares[0]] * 4
    assert shares[0]["z"] == pytest.approx(0.8)
    assert record["analysis"]["retention"] == [1.0] * 3


PAIR = {
    "l.lora_A.weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
    "l.lora_B.weight": torch.tensor([[3.0, 0.0], [0.0, 1.0]]),
}


def pair_server(space, ranks=None, **settings):
    table = Federate(**{"merge": "mean", "rounds": 2, "quorum": 1.0, "regulariser": "none", "space": space, **settings})
    return Coordinator(("x", "y"), PAIR, table, ranks=ranks)


def answers(server, changes):
    for name in server.asked:
        given = server.order(name).adapter
        update = {key: torch.full_like(tensor, changes[name]) for key, tensor in given.items()}
        take(server, dataclasses.replace(reply(name), update=update))
    return server.close()


def test_on_a_frozen_a_only_b_is_sent_and_changed():
    server = pair_server("frozen-a")
    server.begin("xy")
    assert server.order("x").adapter.keys() == {"l.lora_B.weight"}
    closed = answers(server, {"x": 1.0, "y": 3.0})
    assert torch.equal(closed.adapter["l.lora_A.weight"], PAIR["l.lora_A.weight"])
    assert torch.equal(closed.adapter["l.lora_B.weight"], PAIR["l.lora_B.weight"] + 2.0)
    assert closed.conflict.keys() == {"l.lora_B.weight"}


def test_in_the_product_space_the_mean_is_that_of_the_products():
    server = pair_server("product")
    server.begin("xy")
    closed = answers(server, {"x": 0.5, "y": -0.5})
    a, b = PAIR["l.lora_A.weight"], PAIR["l.lora_B.weight"]
    expected = ((b + 0.5) @ (a + 0.5) + (b - 0.5) @ (a - 0.5)) / 2
    product = closed.adapter["l.lora_B.weight"] @ closed.adapter["l.lora_A.weight"]
    assert torch.allclose(product, expected, atol=1e-5)


@pytest.mark.parametrize(("y", "conflict"), [(-0.5, 1.0), (0.5, 0.0)])
def test_in_the_product_space_the_conflict_of_the_products_travels_as_that_of_factors(y, conflict):
    # With -0.5 for 0.5 every coordinate of y's product falls, where x's rises.
    server = pair_server("product", ranks={"x": 1}, regulariser="pcr")
    server.begin("xy")
    assert server.order("y").conflict is None
    answers(server, {"x": 0.5, "y": y})
    server.begin("xy")
    for name in "xy":
        order = server.order(name)
        read = decode_order(encode_order(order), order.adapter, "fp32")
        assert {key: t.shape for key, t in read.conflict.items()} == {key: t.shape for key, t in order.adapter.items()}
        assert all(bool((tensor == conflict).all()) for tensor in read.conflict.values())


def test_an_update_whose_product_overflows_is_left_out():
    server = pair_server("product", quorum=1)
    server.begin("xy")
    huge = {key: torch.full_like(tensor, 1e30) for key, tensor in PAIR.items()}
    assert "NaN or Inf" in take(server, dataclasses.replace(reply("x"), update=huge))
    assert answers_of(server, "y").record["quarantined"][0]["client"] == "x"


def answers_of(server, name):
    take(server, dataclasses.replace(reply(name), update={key: torch.zeros_like(t) for key, t in PAIR.items()}))
    return server.close()


def test_a_client_of_lower_rank_gets_the_best_adapter_of_its_rank():
    server = pair_server("product", ranks={"x": 1})
    server.begin("xy")
    low, full = server.order("x").adapter, server.order("y").adapter
    assert (low["l.lora_A.weight"].shape, low["l.lora_B.weight"].shape) == ((1, 2), (2, 1))
    assert torch.allclose(
        low["l.lora_B.weight"] @ low["l.lora_A.weight"], torch.tensor([[3.0, 0.0], [0.0, 0.0]]), atol=1e-6
    )
    assert torch.equal(full["l.lora_A.weight"], PAIR["l.lora_A.weight"])
    closed = answers(server, {"x": 0.0, "y": 0.0})
    product = closed.adapter["l.lora_B.weight"] @ closed.adapter["l.lora_A.weight"]
    assert torch.allclose(product, PAIR["l.lora_B.weight"] @ PAIR["l.lora_A.weight"], atol=1e-5)


@pytest.mark.parametrize("wire", ["bf16", "int8", "int4"])
def test_what_clients_read_of_an_encoded_adapter_is_what_their_update_is_held_against(wire):
    start = {name: torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
    moved = {name: tensor + 0.1 * tensor.sin() for name, tensor in start.items()}
    server = Coordinator(("x",), moved, Federate(wire_down=wire, rounds=2), start=start)
    server.begin("x")
    order = server.order("x")
    read = decode_order(encode_order(order), start, wire)
    assert all(torch.equal(read.adapter[name], order.adapter[name]) for name in start)
    error = max(float((read.adapter[name] - moved[name]).abs().max()) for name in start)
    assert 0 < error < {"bf16": 1e-3, "int8": 2e-3, "int4": 3e-2}[wire]
    assert all(torch.equal(server.adapter[name], moved[name]) for name in start)  # the server's own stays exact
