"""What clients score, which round is kept, and when the federation ends: the same by every engine, and after kills."""

import json

import pytest

from fedproxy.deployment.chain import read
from tests.deployment.conftest import Federation, eventually

SETTINGS = {"rounds": 8, "quorum": 3, "validation": 0.25, "keep": "best", "patience_rounds": 2, "alone": True}


def made(federation) -> Federation:
    """A federation whose loss soon rises."""
    one: Federation = federation(**SETTINGS)
    one.experiment.write_text(one.experiment.read_text().replace("learning_rate = 1e-2", "learning_rate = 1e-1"))
    return one


def scores(one: Federation, out: str) -> list[object]:
    """What of the records of all rounds does not depend on time."""
    files = sorted((one.folder / out / "rounds").glob("0*/round.json"))
    records = [json.loads(file.read_text()) for file in files]
    return [(each["validation"], {n: c["validation"] for n, c in each["clients"].items()}) for each in records]


@pytest.mark.slow
def test_over_tls_and_after_kills_it_is_that_of_one_process(federation) -> None:
    one = made(federation)
    one.federate("whole").ends()
    assert scores(one, "whole")[-1][0]["stop"]
    assert 2 < len(scores(one, "whole")) < SETTINGS["rounds"]
    owner = one.serve("run")
    clients = one.join_all()
    for kind, number in (("round_opened", 2), ("scoring", 2)):
        seen = sum(event["round"] == number for event in one.events("run", kind))
        assert eventually(
            lambda kind=kind, seen=seen: sum(event["round"] == 2 for event in one.events("run", kind)) > seen
        )
        owner.kill()
        assert eventually(lambda owner=owner: not owner.family(), 10.0), owner.family()
        owner = one.serve("run", "--resume")
    owner.ends()
    for client in clients.values():
        assert "The federation is complete" in client.ends()
    assert scores(one, "run") == scores(one, "whole")
    assert one.adapter("run") == one.adapter("whole")


@pytest.mark.long
def test_in_a_simulation_it_is_that_of_one_process(federation) -> None:
    one = made(federation)
    one.federate("whole").ends()
    one.federate("simulated", "--engine", "simulation").ends()
    assert scores(one, "simulated") == scores(one, "whole")
    assert one.adapter("simulated") == one.adapter("whole")


@pytest.mark.slow
def test_a_client_may_bring_rows_of_its_own_or_give_no_scores(federation) -> None:
    one: Federation = federation(rounds=1, quorum=3, validation=0.25)
    own = one.folder / "own.jsonl"
    own.write_text((one.folder / "animals.jsonl").read_text())
    owner = one.serve("run")
    animals = one.join("animals", "--validation", own, cache="animals")
    colours = one.join("colours", "--no-scores", cache="colours")
    one.join("numbers")
    owner.ends()
    assert "Sent a score: the merged adapter of round 1 has loss" in animals.ends()
    assert "score" not in colours.ends().partition("Ready")[2]
    noted = [event["client"] for event, _ in read(one.folder / "run" / "audit.jsonl") if event["event"] == "not scored"]
    assert noted == ["colours"]
    for name, kinds in (("animals", ["update", "score"]), ("colours", ["update"])):
        (ledger,) = (one.folder / name).rglob("ledger.jsonl")
        assert [line["event"] for line, _ in read(ledger) if line["to"] == "SuperNode"] == kinds
    record = one.record("run", 1)
    rows = {name: client["rows"] for name, client in record["clients"].items()}
    assert "validation" not in record["clients"]["colours"]
    found = {n: c["validation"]["global"]["rows"] for n, c in record["clients"].items() if "validation" in c}
    whole = rows["animals"]
    assert (rows["colours"], rows["numbers"]) == (whole, whole - whole // 4)
    assert found == {"animals": whole, "numbers": whole // 4}
    assert record["validation"]["global"]["clients"] == 2
