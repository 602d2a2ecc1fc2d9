import math

import pytest

from fedproxy.errors import ArtifactError, FederationError, FedproxyError
from fedproxy.federation import rounds
from fedproxy.federation.inline import InlineExchange
from fedproxy.federation.messages import Refusal
from fedproxy.federation.rounds import drive
from tests.federation.replies import coordinator, reply


class Scripted:
    """An exchange that follows a script: for each look who is there, for each order what comes back."""

    def __init__(self, there, answers):
        self.there, self.answers, self.orders = list(there), list(answers), []

    def available(self):
        return self.there.pop(0) if len(self.there) > 1 else self.there[0]

    def ask(self, orders, deadline):
        self.orders.append((next(iter(orders.values())).round, tuple(orders), deadline))
        yield from self.answers.pop(0)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time that passes only in pauses."""
    now = [0.0]
    monkeypatch.setattr(rounds.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rounds.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def good(*names, round=1):
    return [(name, reply(name, round=round)) for name in names]


def run(server, exchange):
    closed, events = [], []
    drive(
        server, exchange, lambda done, taken: closed.append(done), on_event=lambda name, **v: events.append((name, v))
    )
    return closed, events


def test_rounds_go_on_until_all_are_complete_and_each_is_stored_before_the_next():
    stored = []

    class Exchange(Scripted):
        def ask(self, orders, deadline):
            assert stored == list(range(1, orders["x"].round))
            return super().ask(orders, deadline)

    exchange = Exchange(["xy"], [good("x", "y"), good("y", "x", round=2)])
    drive(coordinator(deadline="1m"), exchange, lambda done, taken: stored.append(done.round))
    assert stored == [1, 2]
    assert exchange.orders == [(1, ("x", "y"), 60.0), (2, ("x", "y"), 60.0)]


def test_the_first_round_waits_for_all_later_ones_for_a_quorum(clock):
    exchange = Scripted(["", "x", "x", "xy", "y"], [good("x", "y"), good("y", round=2)])
    closed, events = run(coordinator(quorum=0.5), exchange)
    assert [done.record["asked"] for done in closed] == [["x", "y"], ["y"]]
    assert clock[0] == 3 * rounds.POLL_SECONDS
    assert [values["present"] for name, values in events if name == "waiting"] == [[], ["x"]]


def test_a_newcomer_takes_part_from_the_next_round_on():
    exchange = Scripted(["xy", "xyz", "xz"], [good("x", "y"), good("x", "y", "z", round=2), good("x", "z", round=3)])
    closed, _ = run(coordinator(quorum=0.6, rounds=3), exchange)
    assert [done.record["asked"] for done in closed] == [["x", "y"], ["x", "y", "z"], ["x", "z"]]
    assert [list(done.record["clients"]) for done in closed] == [["x", "y"], ["x", "y", "z"], ["x", "z"]]


def test_after_its_patience_the_first_round_is_content_with_a_quorum(clock):
    closed, _ = run(coordinator(quorum=0.5, rounds=1, patience="1m"), Scripted(["x"], [good("x")]))
    assert closed[0].record["asked"] == ["x"]
    assert clock[0] == 60


def test_a_wait_for_clients_ends_and_says_who_is_missing(clock):
    exchange = Scripted(["xz"], [])
    with pytest.raises(FederationError, match=r"needs 3 clients .* there are 2: x, z. Missing: y.*patience is 2m\."):
        run(coordinator("xyz", quorum=3, patience="2m"), exchange)
    assert clock[0] == 120
    assert exchange.orders == []


def test_nobody_waits_for_clients_that_may_not_be_asked(clock):
    struck = [{"round": 1, "analysis": {"clients": 1}, "quarantined": [{"client": "x", "kind": "invalid"}] * 3}]
    with pytest.raises(FederationError, match=r"No longer asked.*: x"):
        run(coordinator(quorum=2, records=struck), Scripted(["xy"], []))
    assert clock[0] == 0


def test_a_round_without_a_quorum_is_repeated():
    answers = [
        good("x"),
        [("y", Refusal("y", 1, "out of memory")), *good("x")],
        good("x", "y"),
        good("x", "y", round=2),
    ]
    exchange = Scripted(["xy"], answers)
    closed, events = run(coordinator(quorum=1.0), exchange)
    assert [order[0] for order in exchange.orders] == [1, 1, 1, 2]
    assert [len(done.record["attempts"]) for done in closed] == [2, 0]
    assert [name for name, _ in events].count("round_failed") == 2


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_retries_end(retries):
    exchange = Scripted(["xy"], [good("x")] * 9)
    with pytest.raises(FederationError, match=r"1 valid replies of 2[\s\S]*y: no reply in time"):
        run(coordinator(quorum=1.0, retries=retries), exchange)
    assert len(exchange.orders) == retries + 1


def test_a_client_that_took_too_long_is_named_once_and_asked_again():
    slow = reply("y", seconds=61.0)
    exchange = Scripted(["xy"], [[*good("x"), ("y", slow)], good("x", "y"), good("x", "y", round=2)])
    closed, events = run(coordinator(quorum=1.0, deadline="1m"), exchange)
    (reason,) = [values["reason"] for name, values in events if name == "round_failed"]
    assert reason.splitlines()[1:] == ["  - y: it took 61 s, the deadline is 1m"]
    assert closed[0].record["attempts"][0]["dropouts"] == ["y"]


def test_invalid_replies_are_not_asked_for_again():
    exchange = Scripted(["xy"], [[("x", reply("x", math.nan, 0, 0)), *good("y")]] * 9)
    with pytest.raises(FederationError, match="NaN"):
        run(coordinator(quorum=1.0), exchange)
    assert len(exchange.orders) == 1


def test_inline_asks_each_in_turn_and_a_failed_training_costs_one_reply():
    def answer(order, name):
        if name == "y":
            raise FedproxyError("the loss became NaN")
        return reply(name, round=order.round)

    closed, _ = run(coordinator("xyz", rounds=1), InlineExchange(answer, "xyz"))
    assert list(closed[0].record["clients"]) == ["x", "z"]
    assert closed[0].record["refused"] == [{"client": "y", "kind": "failed", "reason": "the loss became NaN"}]


def test_inline_does_not_hide_what_is_wrong_with_its_inputs():
    def answer(order, name):
        raise ArtifactError("the adapter does not fit")

    with pytest.raises(ArtifactError, match="does not fit"):
        run(coordinator(), InlineExchange(answer, "xy"))
