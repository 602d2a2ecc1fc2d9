import logging

import pytest

from fedproxy.deployment import members as members_module
from fedproxy.deployment.certificates import load_private, make_key
from fedproxy.deployment.keys import (
    add_client,
    client_key_file,
    init_keys,
    read_client_key,
    revoke_client,
    rotate_client,
)
from fedproxy.deployment.members import Members, read_members
from fedproxy.deployment.welcome import StrangerError, public_pem
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.run_directory import has_members


@pytest.fixture
def keys(tmp_path):
    init_keys(tmp_path / "keys")
    for name in ("bank", "shop"):
        add_client(tmp_path / "keys", name)
    return tmp_path / "keys"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def public_key(keys, name):
    held = read_client_key(client_key_file(keys, name))
    return public_pem(load_private(held.private_openssh).public_key())


def stranger():
    return public_pem(make_key().public_key())


def test_the_register_says_who_is_who(keys, run):
    assert not has_members(run)
    members = Members(keys, run)
    bank = public_key(keys, "bank")
    assert members.enter(bank, "shop").name == "bank"  # the key tells, not what a client says
    assert members.find(bank)
    assert members.holds(members.enter(bank, "").identity)
    assert not members.find(stranger())
    assert read_members(run) == {"bank": bank, "shop": public_key(keys, "shop")}
    with pytest.raises(StrangerError, match="not registered"):
        members.enter(stranger(), "bank")


def test_only_the_experiments_names_take_part(keys, run):
    members = Members(keys, run, ["bank"])
    assert list(members.all) == list(read_members(run)) == ["bank"]
    with pytest.raises(StrangerError, match="takes no part"):
        members.enter(public_key(keys, "shop"), "")


def test_a_change_of_the_register_counts_at_once(keys, run):
    members = Members(keys, run)
    bank = public_key(keys, "bank")
    identity = members.enter(bank, "").identity
    revoke_client(keys, "bank")
    assert not members.find(bank)
    assert not members.holds(identity)
    assert list(read_members(run)) == ["shop"]
    with pytest.raises(StrangerError, match="revoked"):
        members.enter(bank, "")

    add_client(keys, "bank")
    heir = members.enter(public_key(keys, "bank"), "")
    assert (heir.name, members.holds(heir.identity), members.holds(identity)) == ("bank", True, False)
    assert read_members(run)["bank"] == heir.public_key
    with pytest.raises(StrangerError, match="revoked"):
        members.enter(bank, "")


def test_a_rotated_key_is_the_clients_from_the_next_request_on(keys, run):
    members = Members(keys, run)
    old, before = public_key(keys, "bank"), members.all["bank"]
    rotate_client(keys, "bank")
    assert not members.find(old)
    assert not members.holds(before.identity)
    now = members.enter(public_key(keys, "bank"), "")
    assert (now.name, now.public_key) == ("bank", public_key(keys, "bank"))
    assert read_members(run) == {"bank": now.public_key, "shop": public_key(keys, "shop")}
    with pytest.raises(StrangerError, match="revoked"):
        members.enter(old, "")


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"format": 9, "clients": [], "revoked_keys": []}'])
def test_while_the_register_is_damaged_nobody_is_known_and_nothing_ends(keys, run, content, caplog):
    members = Members(keys, run)
    before, path = members.all, keys / "clients.json"
    whole = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    for ask in (lambda: members.find(stranger()), lambda: members.enter(stranger(), ""), lambda: members.all):
        with pytest.raises(ArtifactError) as raised:
            ask()
        assert not isinstance(raised.value, StrangerError)
    with caplog.at_level(logging.WARNING):
        assert members.refresh() == members.refresh() == before
    assert [record.message.partition(":")[0] for record in caplog.records] == ["Nobody is let in until this is mended"]
    path.write_bytes(whole)
    assert members.all == before
    assert members.find(public_key(keys, "bank"))


def test_a_register_that_cannot_be_used_is_told_at_the_start(tmp_path, keys, run):
    with pytest.raises(UsageError, match="no folder of keys"):
        Members(tmp_path / "nothing", run)
    (keys / "clients.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"clients\.json"):
        Members(keys, run)


def test_without_a_register_a_name_is_its_first_keys_until_that_is_silent(run, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(members_module.time, "monotonic", lambda: now[0])
    members = Members(None, run, ["bank", "shop"])
    first, second = stranger(), stranger()
    assert members.enter(first, "bank").name == "bank"
    now[0] += 29.0
    with pytest.raises(StrangerError, match="bank"):
        members.enter(second, "bank")
    assert members.find(first)
    now[0] += 29.0
    with pytest.raises(StrangerError, match="Another client"):
        members.enter(second, "bank")
    now[0] += 2.0
    assert members.enter(second, "bank").public_key == second
    assert read_members(run) == {"bank": second}
    assert not members.find(first)


@pytest.mark.parametrize(
    ("name", "says"), [("", "no name"), ("../x", "no name"), ("pub", "takes no part"), ("a\n", "no name")]
)
def test_without_a_register_names_are_checked(run, name, says):
    with pytest.raises(StrangerError, match=says):
        Members(None, run, ["bank"]).enter(stranger(), name)
