"""What the owner is told and kept from: a second process on a run, a federation that fails."""

import pytest

from tests.deployment.conftest import WORDS, Federation, eventually

pytestmark = pytest.mark.long


def test_a_run_at_work_is_left_alone(federation) -> None:
    one: Federation = federation(rounds=1, quorum=3)
    run = one.folder / "run"
    owner = one.serve("run")
    first, second, third = WORDS
    clients = [one.join(name) for name in (first, second)]
    assert eventually(lambda: any(len(event["present"]) == 2 for event in one.events("run", "waiting")))
    members = (run / "members.json").read_bytes(), (run / "members.json").stat().st_ino
    elsewhere = ["serve", one.experiment, "--out", run, "--listen", "127.0.0.1:0", "--keys", one.keys]
    others = [one.start(f"other{flag}", *elsewhere, flag) for flag in ("--resume", "--overwrite")]
    others += [one.federate("run", flag) for flag in ("--resume", "--overwrite")]
    for other in others:
        assert "Another process is at work on" in other.ends(2)
    assert members == ((run / "members.json").read_bytes(), (run / "members.json").stat().st_ino)
    clients.append(one.join(third))
    owner.ends()
    for client in clients:
        assert "The federation is complete" in client.ends()


def test_clients_of_a_federation_that_failed_end_and_the_owner_is_told_so(federation) -> None:
    one: Federation = federation(rounds=1, quorum=3, patience="20s")
    owner = one.serve("run")
    clients = [one.join(name) for name in ("animals", "colours")]
    said = owner.ends(4)
    assert "Missing: numbers" in said
    assert "each has to join again" in said
    for client in clients:
        assert "ended without success" in client.ends(4)
    (ended,) = [event for event in one.events("run", "stage_ended") if event["stage"] == "federate"]
    assert ended["outcome"] == "failed"
    assert "Missing: numbers" in str(ended["error"])
