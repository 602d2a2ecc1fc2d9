import math

import pytest
import torch

from fedproxy.config import Federate
from fedproxy.errors import FederationError
from fedproxy.federation.coordinator import Coordinator, Reply

PHI = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}


def update(*values):
    return {"a": torch.tensor(values[:2], dtype=torch.float32), "b": torch.tensor([[values[2]]], dtype=torch.float32)}


def reply(client, *values, round=1, **changes):
    fields = {
        "rows": 10,
        "tokens": 50,
        "steps": 2,
        "loss": 1.0,
        "seconds": 3.0,
        "update": update(*(values or (1, 1, 1))),
    }
    return Reply(client=client, round=round, **{**fields, **changes})


def coordinator(clients=("x", "y"), **settings):
    return Coordinator(clients, PHI, Federate(**{"merge": "mean", "rounds": 2, "quorum": 0.5, **settings}))


def test_a_round_adds_the_merged_update_to_the_adapter():
    server = coordinator()
    order = server.begin()
    assert (order.round, order.conflict) == (1, None)
    assert server.receive(reply("x", 1, -1, 0, rows=10)) is None
    assert server.receive(reply("y", 4, -1, 0, rows=20)) is None
    closed = server.close()
    assert closed.adapter["a"].tolist() == [4.0, 1.0]
    assert closed.conflict["a"].tolist() == [0.0, 0.0]
    assert closed.conflict["b"].tolist() == [[1.0]]
    assert server.begin().conflict is closed.conflict


def test_the_order_of_arrival_changes_nothing():
    results = []
    for names in (["x", "y", "z"], ["z", "x", "y"]):
        server = coordinator(("z", "y", "x"), merge="h-ties")
        server.begin()
        generator = torch.Generator().manual_seed(0)
        updates = {name: torch.randn(3, generator=generator).tolist() for name in ("x", "y", "z")}
        for name in names:
            server.receive(reply(name, *updates[name]))
        results.append(server.close())
    assert all(torch.equal(results[0].adapter[name], results[1].adapter[name]) for name in PHI)
    assert results[0].record == results[1].record


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (reply("stranger"), "takes no part"),
        (reply("x", round=2), "it answers round 2, this is round 1"),
        (reply("x", math.nan, 1, 1), "NaN"),
        (reply("x", 1, math.inf, 1), "Inf"),
        (reply("x", update={"a": PHI["a"]}), "b is missing"),
        (reply("x", update={**update(1, 1, 1), "c": PHI["a"]}), "c is unknown"),
        (reply("x", update={**update(1, 1, 1), "a": torch.zeros(3)}), "shape"),
        (reply("x", update={**update(1, 1, 1), "a": torch.zeros(2, dtype=torch.float16)}), "dtype"),
        (reply("x", loss=math.nan), "nothing was trained"),
        (reply("x", rows=0), "nothing was trained"),
        (reply("x", seconds=61.0), "the deadline is 1m"),
    ],
)
def test_a_bad_reply_is_quarantined_and_the_round_goes_on(bad, says):
    server = coordinator(deadline="1m")
    server.begin()
    assert says in server.receive(bad)
    assert server.receive(reply("y", 1, 2, 3)) is None
    closed = server.close()
    assert closed.adapter["a"].tolist() == [2.0, 4.0]
    assert [q["client"] for q in closed.record["quarantined"]] == [bad.client]
    assert list(closed.record["clients"]) == ["y"]


def test_a_client_replies_once():
    server = coordinator()
    server.begin()
    server.receive(reply("x", 1, 1, 1))
    assert server.receive(reply("x", 9, 9, 9)) == "it replied already"
    assert server.close().adapter["a"].tolist() == [2.0, 3.0]


def test_without_a_quorum_the_round_stays_undone():
    server = coordinator(quorum=1.0)
    server.begin()
    server.receive(reply("x"))
    server.receive(reply("y", math.nan, 0, 0))
    with pytest.raises(FederationError, match=r"1 valid replies of 2.*needs 2[\s\S]*y: .*NaN"):
        server.close()
    assert server.completed == 0
    assert server.begin().round == 1


def test_it_ends_after_the_last_round():
    server = coordinator(("x",), rounds=1)
    server.begin()
    server.receive(reply("x"))
    assert not server.done
    server.close()
    assert server.done
    with pytest.raises(RuntimeError):
        server.begin()


def test_a_resumed_coordinator_goes_on_in_the_same_bits():
    def drive(server, rounds):
        for _ in range(rounds):
            order = server.begin()
            for name in ("x", "y"):
                values = [math.sin(order.round * len(name) + i + ord(name)) for i in range(3)]
                server.receive(reply(name, *values, round=order.round))
            last = server.close()
        return last

    whole = drive(coordinator(rounds=3, merge="h-ties"), 3)
    first = drive(coordinator(rounds=3, merge="h-ties"), 1)
    settings = Federate(merge="h-ties", rounds=3, quorum=0.5)
    resumed = Coordinator(("x", "y"), first.adapter, settings, conflict=first.conflict, completed=1)
    last = drive(resumed, 2)
    assert all(torch.equal(whole.adapter[name], last.adapter[name]) for name in PHI)


def test_bytes_count_adapter_conflict_and_update():
    server = coordinator()
    for round in (1, 2):
        server.begin()
        server.receive(reply("x", round=round))
        record = server.close().record["clients"]["x"]
        assert (record["bytes_up"], record["bytes_down"]) == (12, 12 * round)
