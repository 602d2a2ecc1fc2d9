"""What the run writes of its rounds reaches the clients and the audit log; here a real coordinator writes it."""

import math
from dataclasses import replace

import pytest
import torch

from fedproxy.config import Federate
from fedproxy.deployment.audit import AUDIT, Audit, check
from fedproxy.deployment.verdicts import FEW, GIVES_NONE, LATE, Verdicts
from fedproxy.deployment.welcome import Verdict
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.messages import Refusal, Reply, Score, Scored
from fedproxy.federation.rounds import drive
from fedproxy.federation.store import RoundStore
from fedproxy.run_directory import RunDirectory

NAMES = ["bank", "clinic", "law", "shop"]


class Clients:
    """Four clients, which answer in each attempt what `said` tells of it: values of their updates, or a refusal.

    Asked to score, they say what `scores` tells: a loss, or whatever else they answer; with their reply they score
    unless that is none.
    """

    def __init__(self, said, scores=None):
        self.said, self.scores = iter(said), scores or {}

    def available(self):
        return NAMES

    def ask(self, orders, deadline):
        first = next(iter(orders.values()))
        number = first.round
        if not first.trains:
            for name in orders:
                answer = self.scores[name]
                if answer is not LATE:
                    yield (
                        name,
                        Scored(name, number, Score(answer, 4))
                        if isinstance(answer, float)
                        else replace(answer, round=number),
                    )
            return
        for name, value in next(self.said).items():
            update = {"w": torch.full((2, 2), value if isinstance(value, float) else 0.0)}
            reply = Reply(name, number, update, rows=4, tokens=1, steps=1, loss=1.0, seconds=0.1)
            if self.scores.get(name) is not None:
                scored = ["own", *["untuned"] * orders[name].untuned]
                reply = replace(reply, validation=dict.fromkeys(scored, Score(3.0, 4)))
            yield name, reply if isinstance(value, float) else Refusal(name, number, value, "failed")


@pytest.fixture
def follow(tmp_path):
    """Runs rounds, and gives the verdicts as they are after each event, and what the audit log then holds."""

    def run(*said, scores=None, **settings):
        store, directory = RoundStore(tmp_path / "rounds"), RunDirectory(tmp_path)
        federate = Federate(rounds=3, merge="mean", regulariser="none", quorum=2, retries=1, **settings)
        coordinator = Coordinator(NAMES, {"w": torch.zeros(2, 2)}, federate, records=store.records())
        seen = []
        with Audit(tmp_path / AUDIT) as audit:
            verdicts = Verdicts(tmp_path, audit)

            def heard(name, **values):
                directory.event(name, **values)
                verdicts.follow()
                seen.append((name, {client: verdicts.of(client) for client in NAMES}))

            def closed(outcome, seconds):
                store.save(outcome, seconds=seconds)
                heard("round_closed", round=outcome.round, seconds=seconds)

            with pytest.raises(RuntimeError):  # they have said all
                drive(coordinator, Clients(said, scores), closed, on_event=heard)
        noted = [tuple(map(event.get, ("event", "client", "round", "reason"))) for event in check(tmp_path / AUDIT)]
        return seen, noted, Verdicts(tmp_path, audit)

    return run


def test_who_counts_and_who_does_not_is_told_with_the_reason(follow):
    seen, noted, again = follow({"bank": 1.0, "clinic": math.nan, "law": "out of memory"} | {"shop": 1.0})
    assert not any(verdicts["bank"] for name, verdicts in seen if name == "answered")  # the round was still open
    after = dict(seen)["round_closed"]
    assert after["bank"] == after["shop"] == Verdict(1)
    assert after["law"] == Verdict(1, "out of memory")
    assert "NaN" in after["clinic"].reason
    assert {(kind, client, number) for kind, client, number, _ in noted} == {
        ("left out", "clinic", 1),
        ("left out", "law", 1),
    }
    assert {client: again.of(client) for client in NAMES} == after  # a server that was started anew says the same


def test_an_outlier_is_found_when_all_have_answered(follow):
    seen, noted, _ = follow({"bank": 1.0, "clinic": 1.0, "law": 1e6, "shop": 1.0}, max_norm_ratio=10.0)
    after = dict(seen)["round_closed"]
    assert "norm" in after["law"].reason
    assert [entry[:3] for entry in noted] == [("left out", "law", 1)]
    assert noted[0][3] == after["law"].reason


def test_who_is_late_and_whose_round_failed_is_told(follow):
    seen, noted, _ = follow({"bank": 1.0, "law": "killed"}, {"bank": 1.0, "shop": 1.0})
    failed = dict(seen)["round_failed"]
    assert failed == {
        "bank": Verdict(1, FEW),
        "law": Verdict(1, "killed"),
        **dict.fromkeys(("clinic", "shop"), Verdict(1, LATE)),
    }
    assert dict(seen)["round_closed"] | {"law": 0} == {
        "bank": Verdict(1),
        "shop": Verdict(1),
        "clinic": Verdict(1, LATE),
        "law": 0,
    }
    assert [entry[:3] for entry in noted] == [("left out", "law", 1), ("round failed", None, 1)]


def test_whose_score_is_invalid_or_missing_is_noted_with_the_reason(follow):
    """A score that is no number, one that never comes, a refusal, and a client that gives none, which is told once."""
    declined = Refusal("law", 1, "no time\x1b[2J", "declined")
    scores = {"bank": math.nan, "clinic": LATE, "law": declined, "shop": None}
    seen, noted, _ = follow(*[dict.fromkeys(NAMES, 1.0)] * 2, scores=scores, validation=0.1)
    assert {kind for kind, *_ in noted} == {"not scored"}
    found = {(number, client): reason for _, client, number, reason in noted}
    assert len(found) == len(noted)
    assert "loss nan" in found[1, "bank"]
    assert (found[1, "clinic"], found[1, "shop"]) == (LATE, GIVES_NONE)
    assert found[1, "law"] == "no time\ufffd[2J"
    assert {client for number, client in found if number == 2} == {"bank", "clinic", "law"}
    assert set(dict(seen)["round_closed"].values()) == {Verdict(2)}  # their updates count


def test_a_score_that_counts_is_not_noted(follow):
    assert follow(dict.fromkeys(NAMES, 1.0), scores=dict.fromkeys(NAMES, 2.0), validation=0.1)[1] == []
