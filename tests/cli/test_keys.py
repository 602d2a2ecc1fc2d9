import json

import pytest


@pytest.mark.parametrize("command", ["init", "renew", "add", "rotate", "new", "revoke", "list"])
def test_every_command_has_help_with_an_example(cli, command):
    code, out, _ = cli("keys", command, "--help")
    assert code == 0
    assert f"Example: fedproxy keys {command}" in " ".join(out.split())


def test_from_the_first_key_to_the_last(cli, tmp_path):
    folder = tmp_path / "keys"
    code, out, err = cli("keys", "init", folder, "--host", "fl.example.org", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["hosts"] == ["fl.example.org", "localhost", "127.0.0.1"]
    code, out, _ = cli("keys", "add", folder, "bank", "--json")
    assert json.loads(out)["hand_over"] == str(folder / "clients" / "bank.key")
    code, out, _ = cli("keys", "new", tmp_path / "shop.key", "--json")
    public = json.loads(out)["public"]
    code, out, _ = cli("keys", "add", folder, "shop", "--public-key", public, "--json")
    assert json.loads(out)["hand_over"] == str(folder / "ca.crt")
    cli("keys", "new", tmp_path / "shop2.key")
    code, out, _ = cli("keys", "rotate", folder, "shop", "--public-key", tmp_path / "shop2.key.pub", "--json")
    assert json.loads(out)["hand_over"] is None
    code, out, _ = cli("keys", "rotate", folder, "bank", "--json")
    assert json.loads(out)["hand_over"] == str(folder / "clients" / "bank.key")
    assert cli("keys", "revoke", folder, "bank")[0] == 0
    code, out, _ = cli("keys", "list", folder, "--json")
    assert [(c["name"], c["state"]) for c in json.loads(out)["clients"]] == [("bank", "revoked"), ("shop", "active")]
    code, out, err = cli("keys", "list", folder)
    assert (code, out) == (0, "")
    assert "shop" in err


def test_for_people_there_is_a_next_step(cli, tmp_path):
    folder = tmp_path / "keys"
    assert "365 days" in cli("keys", "init", folder)[2]
    assert "bank.key" in cli("keys", "add", folder, "bank")[2]
    assert "to the owner" in cli("keys", "new", tmp_path / "shop.key")[2]
    assert "ca.crt" in cli("keys", "add", folder, "shop", "--public-key", tmp_path / "shop.key.pub")[2]


def test_a_certificate_is_renewed_with_the_cas_key_at_hand(cli, tmp_path):
    folder, away = tmp_path / "keys", tmp_path / "stick" / "ca.key"
    code, out, _ = cli("keys", "init", folder, "--ca-key", away, "--json")
    assert (code, json.loads(out)["ca_key"]) == (0, str(away))
    assert cli("keys", "renew", folder)[0] == 2
    code, out, _ = cli("keys", "renew", folder, "--ca-key", away, "--json")
    assert (code, json.loads(out)["hosts"]) == (0, ["localhost", "127.0.0.1"])
    assert cli("keys", "renew", folder, "--ca-key", folder / "server.key")[0] == 3


def test_errors_have_their_codes(cli, tmp_path):
    folder = tmp_path / "keys"
    assert cli("keys", "list", folder)[0] == 2
    assert cli("keys", "init", folder, "--host", "a b")[0] == 2
    assert cli("keys", "init", folder)[0] == 0
    assert cli("keys", "init", folder)[0] == 2
    assert cli("keys", "revoke", folder, "nobody")[0] == 2
    assert cli("keys", "add", folder, "../bank")[0] == 2
    assert cli("keys", "add", folder, "bank", "--public-key", tmp_path / "none.pub")[0] == 3
    (folder / "clients.json").write_text("[]")
    code, out, err = cli("keys", "list", folder)
    assert (code, out) == (3, "")
    assert "clients.json is damaged" in err
