"""What the run writes of its rounds reaches the clients and the audit log; here a real coordinator writes it."""

import math

import pytest
import torch

from fedproxy.config import Federate
from fedproxy.deployment.audit import AUDIT, Audit, check
from fedproxy.deployment.verdicts import FEW, LATE, Verdicts
from fedproxy.deployment.welcome import Verdict
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.messages import Refusal, Reply
from fedproxy.federation.rounds import drive
from fedproxy.federation.store import RoundStore
from fedproxy.run_directory import RunDirectory

NAMES = ["bank", "clinic", "law", "shop"]


class Clients:
    """Four clients, which answer in each attempt what `said` tells of it: values of their updates, or a refusal."""

    def __init__(self, said):
        self.said = iter(said)

    def available(self):
        return NAMES

    def ask(self, orders, deadline):
        number = next(iter(orders.values())).round
        for name, value in next(self.said).items():
            update = {"w": torch.full((2, 2), value if isinstance(value, float) else 0.0)}
            reply = Reply(name, number, update, rows=1, tokens=1, steps=1, loss=1.0, seconds=0.1)
            yield name, reply if isinstance(value, float) else Refusal(name, number, value, "failed")


@pytest.fixture
def follow(tmp_path):
    """Runs rounds, and gives the verdicts as they are after each event, and what the audit log then holds."""

    def run(*said, **settings):
        store, directory = RoundStore(tmp_path / "rounds"), RunDirectory(tmp_path)
        federate = Federate(rounds=2, merge="mean", regulariser="none", quorum=2, retries=1, **settings)
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
                drive(coordinator, Clients(said), closed, on_event=heard)
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
