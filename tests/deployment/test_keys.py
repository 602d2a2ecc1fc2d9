import datetime
import json
import shutil
import ssl
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedproxy.deployment import certificates, keys
from fedproxy.deployment.handout.https import check_tls
from fedproxy.deployment.keys import add_client, client_key_file, init_keys, new_key, read_client_key, read_registry
from fedproxy.errors import ArtifactError, MissingExtraError, UsageError
from tests.crashes import moments


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys") / "keys"
    init_keys(folder, ["fl.example.org", "192.0.2.7", "::1"])
    return folder


@pytest.fixture
def folder(fresh, tmp_path):
    return shutil.copytree(fresh, tmp_path / "keys")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_server_certificate_is_for_the_hosts_and_signed_by_the_ca(folder):
    ca, server = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.crt", "server.crt"))
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "::1", "127.0.0.1"]
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / "server.crt", folder / "server.key")


def test_secrets_are_for_their_owner_alone(tmp_path, umask):
    folder = tmp_path / "new"
    init_keys(folder)
    add_client(folder, "bank")
    new_key(tmp_path / "own.key")
    secrets = [folder / "ca.key", folder / "server.key", client_key_file(folder, "bank"), tmp_path / "own.key"]
    assert {mode(path) for path in secrets} == {0o600}
    assert mode(folder) == mode(folder / "clients") == 0o700


def test_an_existing_folder_is_left_alone(folder):
    with pytest.raises(UsageError, match="exists"):
        init_keys(folder)


@pytest.mark.parametrize("host", ["", "a b", "fl.example.org:443", "*.example.org", "-a", "1.2.3", "1.2.3.4.5", "ä.de"])
def test_impossible_hosts(tmp_path, host):
    with pytest.raises(UsageError, match="host"):
        init_keys(tmp_path / "k", [host])
    assert not (tmp_path / "k").exists()


def test_a_clients_key_is_what_flower_loads(folder):
    client = add_client(folder, "bank")
    content = client_key_file(folder, "bank").read_bytes()
    private = serialization.load_ssh_private_key(content, None)  # the whole file, as a SuperNode reads it
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    registered = serialization.load_ssh_public_key(read_registry(folder).clients["bank"].public_key.encode())
    assert private.public_key() == registered
    assert isinstance(registered.curve, ec.SECP384R1)
    found = read_client_key(client_key_file(folder, "bank"))
    assert found.ca == (folder / "ca.crt").read_bytes()
    assert serialization.load_ssh_private_key(found.private_openssh, None).public_key() == registered
    assert b"CERTIFICATE" not in found.private_openssh
    assert client.state == "active"


def test_fingerprints_are_those_of_ssh_keygen(folder, tmp_path):
    if shutil.which("ssh-keygen") is None:
        pytest.skip("needs ssh-keygen")
    public = new_key(tmp_path / "own.key")
    shown = subprocess.run(["ssh-keygen", "-l", "-f", public], capture_output=True, text=True, check=True).stdout
    assert add_client(folder, "bank", public).fingerprint == shown.split()[1]
    made = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(tmp_path / "ssh")]
    subprocess.run(made, check=True)
    add_client(folder, "shop", tmp_path / "ssh.pub")
    assert read_client_key(tmp_path / "ssh").ca is None


def test_a_clients_own_key_is_registered_and_no_private_key_is_made(folder, tmp_path):
    public = new_key(tmp_path / "own.key")
    client = add_client(folder, "bank", public)
    assert client.public_key == public.read_text().strip()
    assert not client_key_file(folder, "bank").exists()
    assert read_client_key(tmp_path / "own.key").ca is None
    with pytest.raises(UsageError, match="never overwritten"):
        new_key(tmp_path / "own.key")


def test_a_key_is_one_clients_only(folder, tmp_path):
    public = new_key(tmp_path / "own.key")
    add_client(folder, "bank", public)
    with pytest.raises(UsageError, match='registered as "bank"'):
        add_client(folder, "shop", public)
    with pytest.raises(UsageError, match="registered already"):
        add_client(folder, "bank")


def test_a_revoked_name_takes_another_key_and_never_the_old_one(folder, tmp_path):
    public = new_key(tmp_path / "own.key")
    old = add_client(folder, "bank", public)
    assert keys.revoke_client(folder, "bank").state == "revoked"
    for name in ("bank", "shop"):
        with pytest.raises(UsageError, match="revoked"):
            add_client(folder, name, public)
    new = add_client(folder, "bank")
    found = read_registry(folder)
    assert found.clients == {"bank": new}
    assert found.revoked_keys == {old.fingerprint}
    with pytest.raises(UsageError, match="revoked"):
        add_client(folder, "shop", public)


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def files(folder):
    return folder / "server.crt", folder / "server.key", folder / "ca.crt"


def usable(folder):
    """Whether a client that trusts the CA takes the server."""
    try:
        check_tls(*files(folder))
    except ArtifactError:
        return False
    return True


def test_the_server_certificate_lasts_a_year_and_never_longer_than_the_ca(folder, tmp_path, monkeypatch):
    now = datetime.datetime.now(datetime.UTC)
    server, ca = certificate(folder / "server.crt"), certificate(folder / "ca.crt")
    assert (server.not_valid_after_utc - now).days in (364, 365)
    assert (ca.not_valid_after_utc - now).days in (3649, 3650)
    monkeypatch.setattr(certificates, "CA_DAYS", 100)
    init_keys(tmp_path / "short")
    ends = [certificate(tmp_path / "short" / name).not_valid_after_utc for name in ("server.crt", "ca.crt")]
    assert ends[0] == ends[1] < now + datetime.timedelta(days=101)


def test_renewing_changes_the_server_alone_and_clients_need_nothing(folder):
    add_client(folder, "bank")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    old = certificate(folder / "server.crt")
    assert keys.renew_server(folder) == ["fl.example.org", "192.0.2.7", "::1", "localhost", "127.0.0.1"]
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"server.crt", "server.key"}
    new = certificate(folder / "server.crt")
    names = [c.extensions.get_extension_for_class(x509.SubjectAlternativeName).value for c in (old, new)]
    assert names[0] == names[1]
    assert old.public_key() != new.public_key()
    assert usable(folder)
    assert mode(folder / "server.key") == 0o600


def test_an_expired_server_certificate_is_renewed_and_an_expired_ca_is_not(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "SERVER_DAYS", -0.5)
        init_keys(tmp_path / "server")
        patch.setattr(certificates, "CA_DAYS", -0.5)
        init_keys(tmp_path / "ca")
    assert not usable(tmp_path / "server")
    keys.renew_server(tmp_path / "server")
    assert usable(tmp_path / "server")
    with pytest.raises(ArtifactError, match=r"ca\.crt"):
        keys.renew_server(tmp_path / "ca")


def test_the_cas_key_may_lie_elsewhere(tmp_path):
    folder, away = tmp_path / "keys", tmp_path / "stick" / "ca.key"
    init_keys(folder, ca_key_file=away)
    assert mode(away) == 0o600
    assert not (folder / "ca.key").exists()
    assert add_client(folder, "bank").state == "active"
    assert keys.rotate_client(folder, "bank").state == "active"
    assert keys.revoke_client(folder, "bank").state == "revoked"
    assert usable(folder)  # what `serve` asks for
    with pytest.raises(UsageError, match=r"keys/ca\.key"):
        keys.renew_server(folder)
    with pytest.raises(UsageError, match=r"nowhere\.key"):
        keys.renew_server(folder, tmp_path / "nowhere.key")
    old = (folder / "server.crt").read_bytes()
    keys.renew_server(folder, away)
    assert usable(folder)
    assert (folder / "server.crt").read_bytes() != old


@pytest.mark.parametrize("content", [b"", b"half", "another", "openssh"])
def test_another_key_signs_nothing(folder, tmp_path, content):
    other = certificates.make_key()
    given = {"another": certificates.private_pem(other), "openssh": certificates.private_openssh(other)}
    (tmp_path / "wrong.key").write_bytes(given.get(content, content))
    before = [path.read_bytes() for path in files(folder)]
    with pytest.raises(ArtifactError, match=r"wrong\.key"):
        keys.renew_server(folder, tmp_path / "wrong.key")
    assert [path.read_bytes() for path in files(folder)] == before


def test_a_file_that_is_there_and_a_place_within_the_folder_take_no_ca_key(tmp_path):
    (tmp_path / "ca.key").write_text("another's")
    for place in (tmp_path / "ca.key", tmp_path / "keys" / "ca.key", tmp_path / "keys"):
        with pytest.raises(UsageError, match=str(place)):
            init_keys(tmp_path / "keys", ca_key_file=place)
    assert (tmp_path / "ca.key").read_text() == "another's"
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize(("days", "told"), [(31, False), (29, True), (-0.5, True)])
@pytest.mark.parametrize("name", ["server.crt", "ca.crt"])
def test_the_owner_is_told_thirty_days_before_a_certificate_ends(tmp_path, monkeypatch, name, days, told):
    monkeypatch.setattr(certificates, {"server.crt": "SERVER_DAYS", "ca.crt": "CA_DAYS"}[name], days)
    init_keys(tmp_path / "keys")
    ending = keys.ending_certificates(tmp_path / "keys")
    assert (name in ending) == told
    assert all(end == certificate(tmp_path / "keys" / file).not_valid_after_utc for file, end in ending.items())


def test_a_rotated_key_takes_the_place_of_the_old_one_in_one_moment(folder, tmp_path):
    made, own = add_client(folder, "bank"), add_client(folder, "shop", new_key(tmp_path / "first.key"))
    with_made, with_own = keys.rotate_client(folder, "bank"), new_key(tmp_path / "second.key")
    assert keys.rotate_client(folder, "shop", with_own).public_key == with_own.read_text().strip()
    found = read_registry(folder)
    assert found.clients["bank"] == with_made
    assert {client.state for client in found.clients.values()} == {"active"}
    assert found.revoked_keys == {made.fingerprint, own.fingerprint}
    held = read_client_key(client_key_file(folder, "bank"))
    assert keys.public_openssh(certificates.load_private(held.private_openssh).public_key()) == with_made.public_key


def test_what_cannot_be_rotated_stays_as_it_is(folder, tmp_path):
    public, other = new_key(tmp_path / "own.key"), new_key(tmp_path / "other.key")
    add_client(folder, "bank", public)
    add_client(folder, "shop", other)
    before = read_registry(folder)
    with pytest.raises(UsageError, match='Did you mean "bank"'):
        keys.rotate_client(folder, "bnak")
    for key in (public, other):  # its own old one, and another client's
        with pytest.raises(UsageError, match=key.name):
            keys.rotate_client(folder, "bank", key)
    with pytest.raises(ArtifactError, match=r"none\.pub"):
        keys.rotate_client(folder, "bank", tmp_path / "none.pub")
    assert read_registry(folder) == before
    keys.revoke_client(folder, "bank")
    with pytest.raises(UsageError, match="bank"):
        keys.rotate_client(folder, "bank")


def test_revoking_the_unknown_or_the_revoked(folder):
    add_client(folder, "bank")
    with pytest.raises(UsageError, match='Did you mean "bank"'):
        keys.revoke_client(folder, "bnak")
    keys.revoke_client(folder, "bank")
    with pytest.raises(UsageError, match="already"):
        keys.revoke_client(folder, "bank")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".a", "a" * 65, "a b", "ä"])
def test_impossible_names(folder, name):
    with pytest.raises(UsageError, match="client name"):
        add_client(folder, name)
    assert not (folder / "clients").exists()


def test_clients_added_side_by_side_are_all_registered(folder):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: add_client(folder, f"client{number}"), range(8)))
    assert sorted(read_registry(folder).clients) == [f"client{number}" for number in range(8)]


def damaged(record, kind):
    client = record["clients"][0]
    if kind == "another key":
        client["fingerprint"] = "SHA256:" + "A" * 43
    elif kind == "no key":
        client["public_key"] = "ssh-rsa AAAA"
    elif kind == "path as name":
        client["name"] = "../../x"
    elif kind == "state":
        client["state"] = "admitted"
    elif kind == "contradiction":
        client["state"] = "revoked"
    elif kind == "twice":
        record["clients"].append(client)
    elif kind == "another format":
        record["format"] = 2
    elif kind == "unknown field":
        client["role"] = "owner"
    elif kind == "missing field":
        del client["added"]
    elif kind == "no text":
        client["added"] = 5
    else:
        record = {"list": [], "number": 5, "clients": {**record, "clients": {"a": 1}}}[kind]
    return record


KINDS = ["another key", "no key", "path as name", "state", "contradiction", "twice", "another format", "unknown field"]
KINDS += ["missing field", "no text", "list", "number", "clients"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_register_is_named(folder, kind):
    add_client(folder, "bank")
    path = folder / "clients.json"
    path.write_text(json.dumps(damaged(json.loads(path.read_text()), kind)))
    with pytest.raises(ArtifactError, match=r"clients\.json"):
        read_registry(folder)
    with pytest.raises(ArtifactError):
        add_client(folder, "shop")


def test_missing_and_broken_files(folder, tmp_path):
    with pytest.raises(UsageError, match="no folder of keys"):
        read_registry(tmp_path / "missing")
    with pytest.raises(UsageError, match="no folder of keys"):
        add_client(tmp_path / "missing", "bank")
    with pytest.raises(ArtifactError, match=r"none\.pub"):
        add_client(folder, "bank", tmp_path / "none.pub")
    certificate = (folder / "ca.crt").read_bytes()
    (folder / "ca.crt").write_bytes(certificate[:-60])
    with pytest.raises(ArtifactError, match=r"ca\.crt"):
        add_client(folder, "bank")
    assert read_registry(folder).clients == {}
    (folder / "clients.json").write_text("{")
    with pytest.raises(ArtifactError, match="valid JSON"):
        read_registry(folder)


def test_keys_that_flower_would_not_take(folder, tmp_path):
    other = ed25519.Ed25519PrivateKey.generate()
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    (tmp_path / "ed.pub").write_bytes(other.public_key().public_bytes(*form))
    (tmp_path / "large.pub").write_bytes(b"a" * (1 << 20))
    (tmp_path / "text.pub").write_text("hello")
    for name in ("ed.pub", "large.pub", "text.pub"):
        with pytest.raises(ArtifactError, match=name):
            add_client(folder, "bank", tmp_path / name)


def test_a_damaged_client_key_file(folder, tmp_path):
    add_client(folder, "bank")
    content = client_key_file(folder, "bank").read_bytes()
    key, marker, certificate = content.partition(b"-----BEGIN CERTIFICATE-----")
    for broken in (b"", certificate, key[:100] + marker + certificate, key + marker + certificate[50:], marker + key):
        (tmp_path / "broken.key").write_bytes(broken)
        with pytest.raises(ArtifactError, match=r"broken\.key"):
            read_client_key(tmp_path / "broken.key")
    if shutil.which("ssh-keygen"):
        locked = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "secret", "-f", str(tmp_path / "locked")]
        subprocess.run(locked, check=True)
        with pytest.raises(ArtifactError, match="without a passphrase"):
            read_client_key(tmp_path / "locked")


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(MissingExtraError, match=r"fedproxy\[federation\]"):
        init_keys(tmp_path / "keys")


def test_no_moment_of_a_change_to_the_keys_leaves_a_folder_that_cannot_be_used(fresh, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    for state in moments(lambda: init_keys(place / "keys"), place, tmp_path / "made"):
        if not (state / "keys").exists():
            init_keys(state / "keys")
        assert [path.name for path in state.iterdir()] == ["keys"]
        assert add_client(state / "keys", "bank").state == "active"
    folder = shutil.copytree(fresh, tmp_path / "keys")
    for state in moments(lambda: add_client(folder, "shop"), folder, tmp_path / "added"):
        found = read_registry(state).clients
        assert list(found) in ([], ["shop"])
        client = found.get("shop") or add_client(state, "shop")
        private = serialization.load_ssh_private_key(
            read_client_key(client_key_file(state, "shop")).private_openssh, None
        )
        assert client.public_key == keys.public_openssh(private.public_key())
        assert [path.name for path in (state / "clients").iterdir()] == ["shop.key"]
    old = read_registry(folder).clients["shop"]
    for state in moments(lambda: keys.rotate_client(folder, "shop"), folder, tmp_path / "rotated"):
        found = read_registry(state)
        assert found.clients["shop"].state == "active"
        assert found.revoked_keys == ({old.fingerprint} if found.clients["shop"] != old else set())
        assert keys.rotate_client(state, "shop").state == "active"
    for state in moments(lambda: keys.renew_server(folder), folder, tmp_path / "renewed"):
        assert usable(state) or keys.renew_server(state)
        assert usable(state)
    for state in moments(lambda: keys.revoke_client(folder, "shop"), folder, tmp_path / "revoked"):
        found = read_registry(state)
        revoked = found.clients["shop"].fingerprint in found.revoked_keys
        assert found.clients["shop"].state == ("revoked" if revoked else "active")
        assert revoked or keys.revoke_client(state, "shop").state == "revoked"
