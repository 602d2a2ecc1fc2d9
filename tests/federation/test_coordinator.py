import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.config import Federate
from fedproxy.errors import FederationError
from fedproxy.federation.coordinator import Coordinator, QuorumError
from fedproxy.federation.messages import Refusal
from fedproxy.federation.reply_checks import FAILURES_IN_A_ROW, failures, strikes
from tests.federation.replies import PHI, coordinator, reply, take, update

NAMES = [f"client-{number:02d}" for number in range(20)]


def test_a_round_adds_the_merged_update_to_the_adapter():
    server = coordinator()
    server.begin("xy")
    order = server.order("x")
    assert (order.round, order.conflict, order.voters) == (1, None, 0)
    assert take(server, reply("x", 1, -1, 0, rows=10)) is None
    assert take(server, reply("y", 4, -1, 0, rows=20)) is None
    closed = server.close()
    assert closed.adapter["a"].tolist() == [4.0, 1.0]
    assert closed.conflict["a"].tolist() == [0.0, 0.0]
    assert closed.conflict["b"].tolist() == [[1.0]]
    server.begin("xy")
    order = server.order("x")
    assert (order.conflict, order.voters) == (closed.conflict, 2)


def test_the_server_optimizer_steps_with_the_merged_update_and_goes_on_after_a_resume():
    options = {"server_optimizer": "fedavgm", "server_options": {"momentum": 0.5}}
    server = coordinator(["x"], **options)
    server.begin("x")
    take(server, reply("x", 1, 2, 3))
    first = server.close()
    assert first.adapter["a"].tolist() == [2.0, 4.0]
    state, records = first.server_state, [first.record]
    again = Coordinator(
        ["x"], first.adapter, server.settings, conflict=first.conflict, server_state=state, records=records
    )
    for resumed in (server, again):
        resumed.begin("x")
        take(resumed, reply("x", 1, 2, 3, round=2))
        assert resumed.close().adapter["a"].tolist() == [3.5, 7.0]


@settings(max_examples=30, deadline=None)
@given(st.permutations(["v", "w", "x", "y", "z"]), st.sampled_from(["mean", "ties", "h-ties"]), st.integers(0, 99))
def test_the_order_of_arrival_changes_nothing(arrival, rule, seed):
    generator = torch.Generator().manual_seed(seed)
    updates = {name: torch.randn(3, generator=generator).tolist() for name in "vwxyz"}
    results = []
    for names in ("vwxyz", arrival):
        server = coordinator(names, merge=rule, quorum=0.2)
        server.begin(names)
        for name in names:
            bad = {"loss": math.nan} if name == "w" else {}
            take(server, reply(name, *updates[name], **bad))
        take(server, reply("v", 9, 9, 9))
        results.append(server.close())
    first, second = results
    assert all(torch.equal(first.adapter[name], second.adapter[name]) for name in PHI)
    assert all(torch.equal(first.conflict[name], second.conflict[name]) for name in PHI)
    assert first.record == second.record


@pytest.mark.parametrize(
    ("bad", "says", "kind"),
    [
        (reply("x", round=2), "it answers round 2, this is round 1", "invalid"),
        (reply("x", math.nan, 1, 1), "NaN", "invalid"),
        (reply("x", 1, math.inf, 1), "Inf", "invalid"),
        (reply("x", update={"a": PHI["a"]}), "b is missing", "invalid"),
        (reply("x", update={**update(1, 1, 1), "c": PHI["a"]}), "c is unknown", "invalid"),
        (reply("x", update={**update(1, 1, 1), "a": torch.zeros(3)}), "shape", "invalid"),
        (reply("x", update={**update(1, 1, 1), "a": torch.zeros(2, dtype=torch.float16)}), "dtype", "invalid"),
        (reply("x", 3.4e38, 1, 1), "its norm 3.4e+38 exceeds max_norm 100", "invalid"),
        (reply("x", loss=math.nan), "nothing was trained", "invalid"),
        (reply("x", rows=0), "nothing was trained", "invalid"),
        (reply("x", seconds=61.0), "the deadline is 1m", "late"),
        (Refusal("x", 1, "cannot be read", "invalid"), "cannot be read", "invalid"),
    ],
)
def test_a_bad_reply_is_quarantined_and_the_round_goes_on(bad, says, kind):
    server = coordinator(deadline="1m", max_norm=100.0)
    server.begin("xy")
    assert says in take(server, bad)
    assert take(server, reply("y", 1, 2, 3)) is None
    record = server.close().record
    assert server.adapter["a"].tolist() == [2.0, 4.0]
    [entry] = record["quarantined"]
    assert (entry["client"], entry["kind"]) == ("x", kind)
    assert says in entry["reason"]
    assert list(record["clients"]) == ["y"]
    assert server.strikes["x"] == (kind == "invalid")
    assert record["dropouts"] == (["x"] if kind == "late" else [])


def test_an_update_that_takes_the_adapter_beyond_its_dtype_is_quarantined():
    server = Coordinator("xy", {"w": torch.tensor([3e38])}, Federate(merge="mean", quorum=1))
    server.begin("xy")
    assert "takes the adapter beyond torch.float32" in take(server, reply("x", update={"w": torch.tensor([1e38])}))
    assert take(server, reply("y", update={"w": torch.tensor([-1e38])})) is None


@pytest.mark.parametrize("kind", ["declined", "failed"])
def test_a_refusal_is_recorded_and_is_no_strike(kind):
    server = coordinator()
    server.begin("xy")
    assert take(server, Refusal("x", 1, "too\nmany steps" + "!" * 1000, kind)).startswith("too many steps")
    take(server, reply("y"))
    record = server.close().record
    [entry] = record["refused"]
    assert (entry["client"], entry["kind"], len(entry["reason"])) == ("x", kind, 500)
    assert (record["quarantined"], record["dropouts"], server.strikes["x"]) == ([], [], 0)


def test_the_first_answer_counts_and_a_second_is_no_strike():
    server = coordinator()
    server.begin("xy")
    take(server, reply("x", 1, 1, 1))
    assert take(server, reply("x", 9, 9, 9)) == "it replied already"
    take(server, reply("y", math.nan, 1, 1))
    assert take(server, reply("y", 9, 9, 9)) == "it replied already"
    closed = server.close()
    assert closed.adapter["a"].tolist() == [2.0, 3.0]
    assert server.strikes == {"y": 1}


def test_a_reply_of_an_earlier_round_is_late_and_its_client_may_still_answer_this_one():
    server = coordinator()
    server.begin("xy")
    take(server, reply("x", 1, 1, 1))
    server.close()
    server.begin("xy")
    assert take(server, reply("y", 9, 9, 9)) == "it answers round 1, this is round 2"
    assert take(server, reply("y", 1, 0, 0, round=2)) is None
    assert server.close().adapter["a"].tolist() == [3.0, 3.0]
    assert not server.strikes


def test_a_false_name_is_held_against_the_sender():
    server = coordinator("xyz")
    server.begin("xyz")
    assert server.receive("x", reply("y", 9, 9, 9)) == "it came under the name 'y'"
    assert server.receive("stranger", reply("z", 9, 9, 9)) == "stranger takes no part in this federation"
    assert take(server, reply("y", 1, 1, 1)) is None
    assert take(server, reply("z", 1, 1, 1)) is None
    assert server.close().adapter["a"].tolist() == [2.0, 3.0]
    assert server.strikes == {"x": 1}


@pytest.mark.parametrize(
    ("norms", "left_out"),
    [
        ([1, 1, 10], []),
        ([1, 1, 10.1], ["z"]),
        ([1, 10.1], []),  # of two, either may be wrong
        ([1, 1, 50, 50], ["v", "z"]),  # the lower median of an even number
        ([0, 0, 5], []),
    ],
)
def test_norms_are_held_against_their_median(norms, left_out):
    clients = ["x", "y", "z", "v"][: len(norms)]
    server = coordinator(clients, quorum=1)
    server.begin(clients)
    for client, norm in zip(clients, norms, strict=True):
        assert take(server, reply(client, norm, 0, 0)) is None
    record = server.close().record
    assert [fault["client"] for fault in record["quarantined"]] == left_out
    assert record["norms"] == pytest.approx(dict(sorted(zip(clients, norms, strict=True))))
    assert sorted(server.strikes) == left_out


def test_outliers_can_cost_the_quorum():
    server = coordinator("xyz", quorum=3)
    server.begin("xyz")
    for client, norm in zip("xyz", (1, 1, 1e30), strict=True):
        take(server, reply(client, norm, 0, 0))
    with pytest.raises(QuorumError, match=r"z: its norm 1e\+30 is 1e\+30 times the round's median 1") as missed:
        server.close()
    assert not missed.value.repeatable


@pytest.mark.parametrize(
    ("clients", "participation", "quorum", "asked", "needed"),
    [
        (8, 1.0, 0.75, 8, 6),
        (3, 1.0, 0.75, 3, 3),  # 2.25
        (10, 1.0, 0.7, 10, 7),  # 0.7 · 10 is 7.000000000000001 in floats
        (4, 1.0, 1.0, 4, 4),
        (4, 1.0, 1, 4, 1),
        (200, 0.1, 0.75, 20, 15),
        (20, 0.01, 0.5, 1, 1),
        (20, 0.1, 5, 5, 5),  # at least a quorum is asked
        (7, 0.5, 0.5, 4, 2),  # 3.5 and 2
        (1, 1.0, 0.01, 1, 1),
    ],
)
def test_quorum_and_participation_by_hand(clients, participation, quorum, asked, needed):
    names = [f"{number:03d}" for number in range(clients)]
    server = coordinator(names, participation=participation, quorum=quorum)
    assert (server.target, server.needed) == (asked, needed)
    server.begin(names)
    assert len(server.asked) == asked


@given(st.integers(0, 9), st.integers(1, 20), st.sets(st.sampled_from(NAMES), min_size=10))
@settings(max_examples=50, deadline=None)
def test_whom_a_round_asks_depends_on_seed_and_round_alone(seed, round, present):
    def asked(available):
        done = [{"round": n, "analysis": {"clients": 1}} for n in range(1, round)]
        server = coordinator(NAMES, seed=seed, rounds=20, participation=0.3, quorum=1, records=done)
        server.begin(available)
        return server.asked

    first = asked(sorted(present))
    assert first == asked(sorted(present, reverse=True)) == tuple(sorted(first))
    assert (len(first), set(first) <= present) == (6, True)
    left = present - {first[0]}  # who leaves is replaced, the others stay
    if len(left) >= 6:
        assert set(first[1:]) <= set(asked(left))


def test_everyone_is_asked_about_as_often():
    counts = dict.fromkeys(NAMES, 0)
    for seed in range(400):
        server = coordinator(NAMES, seed=seed, participation=0.25, quorum=1)
        server.begin(NAMES)
        for name in server.asked:
            counts[name] += 1
    assert all(70 <= count <= 130 for count in counts.values())  # 100 ± 3.5 standard deviations


def test_those_not_asked_are_refused_without_a_strike():
    server = coordinator(NAMES, participation=0.1, quorum=1)
    server.begin(NAMES)
    other = next(name for name in NAMES if name not in server.asked)
    assert take(server, reply(other)) == "it was not asked in this round"
    assert not server.strikes


def test_too_few_clients_are_told_by_name():
    server = coordinator("xyz", quorum=1.0)
    with pytest.raises(FederationError, match=r"Round 1 needs 3 clients .* there are 1: y\. Missing: x, z\.") as caught:
        server.begin(["y", "stranger"])
    assert "Start the missing clients, or lower [federate] quorum to 1, and go on with --resume." in str(caught.value)
    server.begin("xyz")
    assert server.order("x").round == 1


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("quorum", [1, 3, 5, 0.5, 1.0])
@pytest.mark.parametrize("present", range(6))
def test_the_advice_to_lower_the_quorum_is_given_where_it_helps_and_then_it_does(secure, quorum, present):
    """Neither a round of nobody nor a sum of two is ever advised."""
    names, settings = "uvwxyz", {"regulariser": "none", "secure": secure}
    server = coordinator(names, quorum=quorum, **settings)
    if server.least <= present:
        return
    with pytest.raises(FederationError, match="Start the missing clients") as caught:
        server.begin(names[:present])
    advised = re.search(r"lower \[federate\] quorum to (\d+)", str(caught.value))
    if advised is None:
        assert coordinator(names, quorum=1, **settings).least > present
    else:
        coordinator(names, quorum=int(advised[1]), **settings).begin(names[:present])


def test_clients_join_and_leave_between_rounds():
    server = coordinator(["x"], quorum=1, rounds=3)
    server.begin(["x", "y"])
    assert server.asked == ("x",)
    take(server, reply("x"))
    server.close()
    server.admit(["x", "y"])
    assert server.clients == ("x", "y")
    server.begin(["y"])
    assert server.asked == ("y",)
    assert take(server, reply("y", round=2)) is None
    assert server.close().record["asked"] == ["y"]


def test_dropouts_are_those_asked_who_did_not_answer():
    server = coordinator("vxyz", quorum=1)
    server.begin("vxyz")
    take(server, reply("x"))
    take(server, reply("y", math.nan, 0, 0))
    take(server, Refusal("z", 1, "no"))
    assert server.close().record["dropouts"] == ["v"]


def test_repeated_offenders_are_not_asked_again_and_resuming_does_not_forgive():
    server = coordinator("xyz", rounds=9, strikes=2, quorum=0.5)
    records = []
    for round in (1, 2):
        server.begin("xyz")
        take(server, reply("x", math.nan, 0, 0, round=round))
        take(server, reply("y", round=round))
        take(server, reply("z", round=round))
        closed = server.close()
        records.append(json.loads(json.dumps(closed.record)))
    resumed = coordinator("xyz", rounds=9, strikes=2, records=records, conflict=closed.conflict)
    for follower in (server, resumed):
        assert follower.completed == 2
        assert (follower.eligible, follower.target, follower.needed) == ({"y", "z"}, 2, 1)
        follower.begin("xyz")
        order = follower.order("y")
        assert (order.round, order.voters, follower.asked) == (3, 2, ("y", "z"))
    with pytest.raises(FederationError, match=r"No longer asked.*: x\."):
        coordinator("xyz", rounds=9, strikes=2, quorum=3, records=records).begin("xyz")


def test_a_client_that_fails_for_ever_is_at_last_not_asked_any_more():
    server, records = coordinator("xyz", rounds=40, quorum=1), []

    def play(*fails):
        server.begin("xyz")
        asked = server.asked
        for name in asked:
            server.receive(
                name,
                Refusal(name, server.completed + 1, "?") if name in fails else reply(name, round=server.completed + 1),
            )
        records.append(server.close().record)
        return asked

    for _ in range(FAILURES_IN_A_ROW - 1):
        assert play("x") == ("x", "y", "z")
    assert play() == ("x", "y", "z")  # a reply that counts, and it begins anew
    for _ in range(FAILURES_IN_A_ROW):
        assert play("x") == ("x", "y", "z")
    assert play("x") == ("y", "z")
    assert server.failures == failures(records) == {"x": FAILURES_IN_A_ROW}
    assert server.strikes["x"] == 0
    assert coordinator("xyz", rounds=40, quorum=1, records=records).eligible == {"y", "z"}


def test_times_without_a_reply_count_in_failed_attempts_too():
    server = coordinator("xy", rounds=3, quorum=2)
    for _ in range(2):
        server.begin("xy")
        server.receive("x", reply("x"))
        with pytest.raises(QuorumError):
            server.close()
    assert server.failures == {"y": 2}
    server.begin("xy")
    for name in "xy":
        server.receive(name, reply(name))
    assert failures([server.close().record]) == server.failures == {}


def test_strikes_of_failed_attempts_survive():
    server = coordinator("xy", quorum=1.0)
    server.begin("xy")
    take(server, reply("x", math.nan, 0, 0))
    with pytest.raises(QuorumError, match=r"1 valid|0 valid") as missed:
        server.close()
    assert missed.value.repeatable  # y did not answer
    server.begin("xy")
    take(server, reply("x"))
    take(server, reply("y"))
    record = server.close().record
    assert record["attempts"][0]["dropouts"] == ["y"]
    assert strikes([record]) == server.strikes == {"x": 1}


def test_without_a_quorum_the_round_stays_undone():
    server = coordinator(quorum=1.0)
    server.begin("xy")
    take(server, reply("x"))
    take(server, reply("y", math.nan, 0, 0))
    with pytest.raises(QuorumError, match=r"1 valid replies of 2.*needs 2[\s\S]*y: .*NaN") as missed:
        server.close()
    assert not missed.value.repeatable  # training is deterministic: the same would come again
    assert missed.value.exit_code == 4
    assert server.completed == 0
    server.begin("xy")
    assert server.order("x").round == 1


def test_it_ends_after_the_last_round():
    server = coordinator(("x",), rounds=1)
    server.begin("x")
    take(server, reply("x"))
    assert not server.done
    server.close()
    assert server.done
    with pytest.raises(RuntimeError):
        server.begin("x")
    with pytest.raises(RuntimeError):
        server.close()


def test_a_resumed_coordinator_goes_on_in_the_same_bits():
    clients = ("v", "w", "x", "y")

    def drive(server, rounds):
        for _ in range(rounds):
            server.begin(clients)
            for name in server.asked:
                order = server.order(name)
                values = [math.sin(order.round + i + ord(name)) for i in range(3)]
                take(server, reply(name, *values, round=order.round))
            last = server.close()
        return last

    table = {"rounds": 4, "merge": "h-ties", "participation": 0.5}
    whole = drive(coordinator(clients, seed=3, **table), 4)
    server, records = coordinator(clients, seed=3, **table), []
    for _ in range(4):
        last = drive(server, 1)
        records.append(json.loads(json.dumps(last.record)))
        server = Coordinator(
            clients, last.adapter, server.settings, seed=3, conflict=last.conflict, records=list(records)
        )
    assert server.done
    assert all(torch.equal(whole.adapter[name], last.adapter[name]) for name in PHI)
    assert whole.record == last.record
