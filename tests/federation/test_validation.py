import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedproxy.errors import ArtifactError
from fedproxy.federation.messages import Refusal, Score, Scored
from fedproxy.federation.rounds import drive
from fedproxy.federation.validation import Standing, check_scores, summary
from fedproxy.metrics import HIGHEST_LOSS
from tests.federation.replies import coordinator, reply, take

OWN = {"own": Score(1.0, 4)}


def test_what_clients_say_together():
    """By hand: x has 3 rows, y one; y has no labels."""
    found = summary(
        {
            "x": {"untuned": Score(4.0, 3, 0.0), "alone": Score(1.0, 3, 1.0), "global": Score(2.0, 3, 2 / 3)},
            "y": {"untuned": Score(8.0, 1), "global": Score(4.0, 1)},
            "z": {"own": Score(9.0, 100, 0.5)},
        }
    )
    assert found["global"] == {
        "clients": 2,
        "rows": 4,
        "loss": {"by_rows": 2.5, "by_clients": 3.0},
        "accuracy": {"by_rows": 2 / 3, "by_clients": 2 / 3},
        "worst": {"client": "y", "loss": 4.0, "rows": 1, "accuracy": None},
    }
    assert found["own"]["worst"]["client"] == "z"
    assert found["gain"] == {
        "untuned": {"loss": 2.5, "accuracy": pytest.approx(2 / 3)},
        "alone": {"loss": -1.0, "accuracy": pytest.approx(-1 / 3)},
    }
    assert summary({}) == {"gain": {}}


def record(number, gain):
    return {"round": number, "validation": {"gain": {} if gain is None else {"untuned": {"loss": gain}}}}


@given(st.lists(st.none() | st.sampled_from([0.0, 0.5, 1.0, -1.0]), max_size=9), st.integers(0, 3))
def test_the_best_round_is_the_first_of_highest_gain_and_patience_counts_the_scored_ones_after_it(gains, patience):
    found = Standing.of([record(number, gain) for number, gain in enumerate(gains, 1)], patience)
    scored = [(gain, number) for number, gain in enumerate(gains, 1) if gain is not None]
    if not scored:
        assert found == Standing(None, False)
        return
    highest = max(gain for gain, _ in scored)
    assert found.best == min(number for gain, number in scored if gain == highest)
    waited = len([number for _, number in scored if number > found.best])
    assert found.stop == (patience > 0 and waited >= patience)


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({}, None),
        (OWN, None),
        (OWN | {"alone": Score(2.0, 4, 0.5)}, None),
        (OWN | {"untuned": Score(2.0, 4)}, "untuned"),
        ({"alone": Score(2.0, 4)}, "alone"),
        ({"global": Score(2.0, 4)}, "global"),
        (OWN | {"alone": Score(2.0, 5)}, "different numbers"),
        ({"own": Score(math.nan, 4)}, "nan"),
        ({"own": Score(math.inf, 4)}, "inf"),
        ({"own": Score(-0.1, 4)}, "-0.1"),
        ({"own": Score(HIGHEST_LOSS + 1, 4)}, f"{HIGHEST_LOSS + 1:.4g}"),
        ({"own": Score(1.0, 0)}, "0 rows"),
        ({"own": Score(1.0, 11)}, "11 rows"),
        ({"own": Score(1.0, 4, 1.5)}, "1.5"),
        ({"own": Score(1.0, 4, math.nan)}, "nan"),
    ],
)
def test_scores_are_those_that_were_asked_for_and_can_be(scores, says):
    answer = reply("x", validation=scores)
    if says is None:
        check_scores(answer, wanted=True, untuned=False, alone=True)
    else:
        with pytest.raises(ArtifactError, match=says):
            check_scores(answer, wanted=True, untuned=False, alone=True)
    if scores:
        with pytest.raises(ArtifactError):
            check_scores(answer, wanted=False, untuned=False, alone=True)
        with pytest.raises(ArtifactError, match="these scores"):
            check_scores(reply("x", validation=OWN), wanted=True, untuned=True, alone=False)


class Clients:
    """An exchange whose clients score the adapter of round t as `losses[t - 1]`."""

    def __init__(self, losses, names="xyz"):
        self.losses, self.names, self.asked, self.extra = losses, names, [], []

    def available(self):
        return list(self.names)

    def ask(self, orders, deadline):
        self.asked.append([(order.round, order.trains, order.untuned, order.since) for order in orders.values()])
        for name, order in orders.items():
            if order.trains:
                scores = {"own": Score(3.0, 4)} | ({"untuned": Score(5.0, 4)} if order.untuned else {})
                yield name, reply(name, round=order.round, validation={} if name == "y" else scores)
            else:
                yield name, Scored(name, order.round, Score(self.losses[order.round - 1], 4))
        yield from self.extra


def run(exchange, server):
    closed, events = [], []
    drive(server, exchange, lambda one, _: closed.append(one), on_event=lambda name, **v: events.append((name, v)))
    return [one.record for one in closed], events


def told(records):
    return [(one["validation"], {name: c.get("validation") for name, c in one["clients"].items()}) for one in records]


def test_the_untuned_proxy_is_scored_once_and_who_gives_no_scores_is_not_asked_for_any():
    exchange = Clients([4.0, 2.0])
    records, _ = run(exchange, coordinator("xyz", validation=0.1))
    assert [[(one[1], one[2]) for one in asked] for asked in exchange.asked] == [
        [(True, True)] * 3,
        [(False, False)] * 2,
        [(True, False), (True, True), (True, False)],
        [(False, False)] * 2,
    ]
    for number, one in enumerate(records):
        scores = one["clients"]["x"]["validation"]
        assert (scores["untuned"]["loss"], scores["global"]["loss"]) == (5.0, exchange.losses[number])
        assert "validation" not in one["clients"]["y"]
    assert [one["validation"]["gain"]["untuned"]["loss"] for one in records] == [1.0, 3.0]


@pytest.mark.parametrize("patience", [0, 1, 2])
def test_the_end_and_the_kept_round_are_those_of_a_run_that_is_resumed_after_every_round(patience):
    losses = [4.0, 2.0, 3.0, 2.5, 1.0, 1.0]
    given = {"validation": 0.1, "keep": "best", "patience_rounds": patience, "rounds": 6}
    server = coordinator("xyz", **given)
    records, _ = run(Clients(losses), server)
    assert (len(records), server.kept) == {0: (6, 5), 1: (3, 2), 2: (4, 2)}[patience]
    for cut in range(len(records)):
        again = coordinator("xyz", records=records[:cut], **given)
        rest, _ = run(Clients(losses), again)
        assert (told(records[:cut] + rest), again.kept) == (told(records), server.kept)
    assert coordinator("xyz", records=records, **given).done


def test_the_last_round_is_kept_where_nobody_scores_or_it_is_asked_for():
    for names, keep in (("y", "best"), ("xyz", "last")):
        server = coordinator(names, validation=0.1, keep=keep)
        records, _ = run(Clients([1.0, 2.0], names), server)
        assert (len(records), server.kept) == (2, 2)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Scored("x", 1, Score(math.nan, 4)), "invalid"),
        (Scored("x", 1, Score(1.0, 5)), "invalid"),
        (Scored("x", 1, Score(1.0, 3)), "invalid"),
        (Scored("z", 1, Score(1.0, 4)), "invalid"),
        (Scored("x", 2, Score(1.0, 4)), "invalid"),
        (reply("x"), "invalid"),
        (Refusal("x", 1, "\x1b[31mno", "declined"), "declined"),
        (Refusal("x", 1, "it cannot be read", "invalid"), "invalid"),
        (Scored("x", 0, Score(1.0, 4)), "late"),
    ],
)
def test_what_is_no_score_costs_the_score_alone_and_is_its_senders(answer, kind):
    server = coordinator("xz", validation=0.1)
    server.begin("xz")
    for name in "xz":
        scores = {"own": Score(3.0, 4), "untuned": Score(5.0, 4)}
        assert take(server, reply(name, validation=scores)) is None
    closed = server.close()
    scoring = server.scoring(closed)
    fault = scoring.receive("x", answer)
    assert scoring.receive("z", Scored("z", 1, Score(2.0, 4))) is None
    assert "did so already" in scoring.receive("z", Scored("z", 1, Score(0.0, 4)))
    server.judge(closed, scoring)
    told = closed.record["validation"]
    assert [(one["client"], one["kind"]) for one in told["faults"]] == [("x", kind), ("z", "late")]
    assert fault == told["faults"][0]["reason"]
    assert "\x1b" not in fault
    assert told["dropouts"] == (["x"] if kind == "late" else [])
    assert (told["global"]["clients"], told["gain"]["untuned"]["loss"]) == (1, 3.0)
    resumed = coordinator("xz", validation=0.1, records=[closed.record])
    assert server.strikes["x"] == resumed.strikes["x"] == (kind == "invalid")


def test_a_score_where_an_update_was_asked_for_is_invalid():
    server = coordinator("xz", validation=0.1)
    server.begin("xz")
    assert "an update was asked for" in server.receive("x", Scored("x", 1, Score(1.0, 4)))
    assert server.strikes["x"] == 1


def test_other_rows_are_compared_with_the_untuned_proxy_anew():
    server = coordinator("x", validation=0.1, rounds=3)
    for number, rows in ((1, 4), (2, 6), (3, 6)):
        server.begin("x")
        untuned = server.order("x").untuned
        scores = {"own": Score(3.0, rows)} | ({"untuned": Score(5.0, rows)} if untuned else {})
        take(server, reply("x", round=number, validation=scores))
        closed = server.close()
        scoring = server.scoring(closed)
        scoring.receive("x", Scored("x", number, Score(1.0, rows)))
        server.judge(closed, scoring)
        assert (untuned, "untuned" in closed.record["clients"]["x"]["validation"]) == (number != 2, number != 2)


def test_orders_of_one_adapter_are_one_object_and_what_is_sent_for_scoring_counts():
    server = coordinator("xz", validation=0.1)
    server.begin("xz")
    first = server.order("x")
    assert first is server.order("z")
    for name in "xz":
        take(server, reply(name, validation={"own": Score(3.0, 4), "untuned": Score(5.0, 4)}))
    closed = server.close()
    before = closed.record["clients"]["x"]["bytes_down"]
    orders = server.scoring(closed).orders
    assert orders["x"] is orders["z"]
    assert closed.record["clients"]["x"]["bytes_down"] == before * 2
