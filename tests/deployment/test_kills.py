"""kill -9 of clients, the owner and its SuperLink: what was complete stays, the end is that of a run without kills."""

import os
import signal

import pytest

from tests.deployment.conftest import Federation, Process, eventually


def superlink(owner: Process) -> int:
    """The SuperLink's process, apart from its keeper."""
    (pid,) = set(owner.family(" flower-superlink ")) - set(owner.family("deployment.flower.process"))
    return pid


@pytest.mark.slow
def test_a_killed_client_costs_the_round_its_reply_and_may_come_back(federation) -> None:
    one: Federation = federation(rounds=500, quorum=2, deadline="60s", max_norm_ratio=1000.0, wire="int4")
    one.write_rows("numbers", 160)
    owner = one.serve("run")
    clients = one.join_all("--patience", "3s")
    one.opened("run", 2)
    killed = clients.pop("numbers")
    killed.kill()
    assert eventually(lambda: not killed.family(), 10.0), killed.family()
    one.opened("run", 5)
    records = [one.record("run", number) for number in range(1, 5)]
    missing = [record for record in records if "numbers" in record["asked"] and "numbers" not in record["clients"]]
    assert [record["round"] for record in missing] == [2]
    faults = {fault["client"] for fault in missing[0]["refused"]}
    assert "numbers" in faults or "numbers" in missing[0]["dropouts"]
    assert all({"animals", "colours"} <= record["clients"].keys() for record in records)

    clients["numbers"] = one.join("numbers", "--patience", "3s")
    assert eventually(lambda: any("numbers" in event["asked"] for event in one.events("run", "round_opened")[-1:]))
    again = one.events("run", "round_opened")[-1]["round"]
    one.opened("run", again + 1)
    assert "numbers" in one.record("run", again)["clients"]

    check_a_supernode_killed_while_it_sends_costs_one_reply_at_most(one, clients["numbers"])
    check_the_newer_of_two_processes_takes_part(one, clients)
    check_a_damaged_memory_is_told(one, clients)
    os.kill(owner.pid, signal.SIGTERM)
    assert "interrupted" in owner.ends(130)
    for client in clients.values():
        assert "has been away for 3 s" in client.ends(4)


def check_a_supernode_killed_while_it_sends_costs_one_reply_at_most(one: Federation, client: Process) -> None:
    """It is known at once that the answer will not come: the round does not wait for its deadline."""
    sent = client.said.count("Sent an update")
    assert eventually(lambda: client.said.count("Sent an update") > sent)
    number = one.events("run", "round_opened")[-1]["round"]
    (supernode,) = set(client.family(" flower-supernode ")) - set(client.family("deployment.flower.process"))
    os.kill(supernode, signal.SIGKILL)
    client.says("SuperNode ended. It is started again")
    one.opened("run", number + 1)
    record = one.record("run", number)
    lost = {fault["client"]: fault["reason"] for fault in record["refused"]}
    assert "numbers" in record["clients"] or "SuperNode" in lost["numbers"] or "left" in lost["numbers"], record
    begun = one.events("run", "round_opened")[-1]["round"]
    assert eventually(lambda: any("numbers" in event["asked"] for event in one.events("run", "round_opened")[begun:]))


def check_the_newer_of_two_processes_takes_part(one: Federation, clients: dict[str, Process]) -> None:
    older, clients["animals"] = clients["animals"], one.join("animals", "--patience", "3s", log="newer")
    assert 'another process joined as "animals"' in older.ends(4)
    clients["animals"].says("Sent an update")


def check_a_damaged_memory_is_told(one: Federation, clients: dict[str, Process]) -> None:
    clients["animals"].kill()
    assert eventually(lambda: not clients["animals"].family(), 10.0)
    for path in (one.folder / "cache" / "clients").glob("*/*/animals/*"):
        path.write_bytes(b"\x01")
    clients["animals"] = one.join("animals", "--patience", "3s", log="damaged")
    said = clients.pop("animals").ends(3)
    assert "truncated" in said, said
    assert "Sent an update" not in said, said
    assert eventually(
        lambda: any("truncated" in str(event["fault"]) for event in one.events("run", "answered") if event["fault"])
    )


@pytest.mark.long
def test_a_killed_owner_and_a_killed_superlink_lose_nothing(federation) -> None:
    one: Federation = federation(rounds=6, quorum=3)
    one.federate("whole").ends()
    owner = one.serve("run")
    clients, complete = one.join_all(), {}
    for kill, opened in ((kill_superlink, 2), (Process.kill, 4)):
        one.opened("run", opened)
        kill(owner)
        assert eventually(lambda owner=owner: not owner.family(), 10.0), owner.family()
        found = one.rounds("run")
        assert {name: found[name] for name in complete} == complete
        complete = found
        assert {name.partition("/")[0] for name in complete} >= {f"{number:04d}" for number in range(1, opened)}
        assert all(client.code is None for client in clients.values())
        owner = one.serve("run", "--resume")
    owner.ends()
    for client in clients.values():
        said = client.ends()
        assert "The federation is complete" in said
        assert said.count(f"{one.address} is back.") == said.count(f"{one.address} is away. ") <= 2
    found = one.rounds("run")
    assert {name: found[name] for name in complete} == complete
    assert one.adapter("run") == one.adapter("whole")
    tensors = {name: content for name, content in one.rounds("whole").items() if name.endswith(".safetensors")}
    assert {name: found[name] for name in tensors} == tensors


def kill_superlink(owner: Process) -> None:
    os.kill(superlink(owner), signal.SIGKILL)
    assert "SuperLink ended. Go on with --resume" in owner.ends(4)


@pytest.mark.long
def test_a_client_that_is_killed_at_the_end_comes_back_for_the_result(federation) -> None:
    one: Federation = federation(rounds=1, quorum=3)
    owner = one.serve("run")
    clients = {name: one.join(name, "--out", one.folder / name) for name in ("animals", "colours", "numbers")}
    assert eventually((one.folder / "run" / "adapter").is_dir)
    killed = clients.pop("numbers")
    killed.kill()
    for client in clients.values():
        client.ends()
    assert not (one.folder / "numbers").exists()
    assert owner.code is None
    back = one.join("numbers", "--out", one.folder / "numbers", log="back")
    assert "The federation is complete" in back.ends()
    owner.ends()
    for name in (*clients, "numbers"):
        assert (one.folder / name / "adapter_model.safetensors").read_bytes() == one.adapter("run")
