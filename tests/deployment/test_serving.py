"""What is wrong with keys, clients or address is found before the LLM is touched; a run has a number of its own."""

import shutil
import socket
from dataclasses import replace

import pytest

import fedproxy
from fedproxy.config import LLM, Compress, Experiment, Federate
from fedproxy.deployment import certificates
from fedproxy.deployment.address import Address
from fedproxy.deployment.keys import add_client, init_keys, revoke_client
from fedproxy.deployment.serving import IDENTITY, Listen, run_identity
from fedproxy.errors import ArtifactError, UsageError
from tests.test_pipeline import write_experiment

EXPERIMENT = Experiment(LLM("llm"), Compress(calibration="text"))


@pytest.fixture
def keys(tmp_path):
    init_keys(tmp_path / "keys")
    for name in ("colours", "numbers"):
        add_client(tmp_path / "keys", name)
    return tmp_path / "keys"


@pytest.fixture
def others(tmp_path):
    init_keys(tmp_path / "others")
    return tmp_path / "others"


def at(keys, port=0):
    return Listen(Address("127.0.0.1", port), keys)


def test_good_keys_and_a_free_address_pass(keys):
    at(keys).check(EXPERIMENT)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"secure": True}, "secure = true: .* needs 3 clients, and the number of clients is 2"),
        ({"quorum": 3}, "quorum = 3: .* is 2"),
    ],
)
def test_too_few_keys_for_a_round_are_told(keys, settings, says):
    experiment = replace(EXPERIMENT, federate=Federate(merge="mean", regulariser="none", **settings))
    with pytest.raises(UsageError, match=says):
        at(keys).check(experiment)
    add_client(keys, "fruits")
    at(keys).check(experiment)


@pytest.mark.parametrize("name", ["server.crt", "ca.crt"])
def test_an_expired_certificate_is_told_with_its_date(keys, tmp_path, monkeypatch, name):
    monkeypatch.setattr(certificates, {"server.crt": "SERVER_DAYS", "ca.crt": "CA_DAYS"}[name], -0.5)
    init_keys(tmp_path / "old")
    shutil.copy(tmp_path / "old" / name, keys / name)
    with pytest.raises(ArtifactError, match=rf"{name}: the certificate expired on 20"):
        at(keys).check(EXPERIMENT)


@pytest.mark.parametrize(("name", "days", "told"), [("SERVER_DAYS", 29, 1), ("CA_DAYS", 29, 2), ("CA_DAYS", 31, 0)])
def test_the_owner_is_warned_of_certificates_that_end_soon(tmp_path, monkeypatch, caplog, name, days, told):
    monkeypatch.setattr(certificates, name, days)
    init_keys(tmp_path / "keys")
    add_client(tmp_path / "keys", "colours")
    at(tmp_path / "keys").check(EXPERIMENT)
    named = {record.args[0].name for record in caplog.records}
    assert named == set(["server.crt", "ca.crt"][:told])  # what ends with the CA ends as well


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["ca.crt"], r"server.crt is no certificate for 127.0.0.1 that .*ca.crt vouches for \(.+\)"),
        (["server.crt", "server.key"], r"server.crt is no certificate for 127.0.0.1 that .*ca.crt vouches for \(.+\)"),
        (["server.crt"], "are no certificate with its key"),
        (["server.key"], "are no certificate with its key"),
    ],
)
def test_files_of_different_folders_do_not_pass(keys, others, names, says):
    for name in names:
        shutil.copy(others / name, keys / name)
    with pytest.raises(ArtifactError, match=says):
        at(keys).check(EXPERIMENT)


@pytest.mark.parametrize("name", ["server.crt", "ca.crt", "server.key"])
@pytest.mark.parametrize("content", [None, b"", b"half"])
def test_a_missing_or_damaged_file_is_told(keys, name, content):
    (keys / name).unlink() if content is None else (keys / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=name):
        at(keys).check(EXPERIMENT)


@pytest.fixture
def federate(tmp_path, tiny_checkpoint, calibration):
    experiment = write_experiment(tmp_path, tiny_checkpoint(), calibration)

    def run(listen):
        try:
            fedproxy.federate(experiment, tmp_path / "run", engine="deployment", listen=listen)
        finally:
            assert not (tmp_path / "run").exists()

    return run


def test_nothing_is_compressed_for_an_address_that_is_taken(keys, federate):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port}\b"):
            federate(at(keys, port))
    with pytest.raises(UsageError, match=r"192\.0\.2\.1:0"):
        federate(Listen(Address("192.0.2.1", 0), keys))


def test_nothing_is_compressed_for_clients_or_keys_that_are_missing(keys, others, federate):
    revoke_client(keys, "numbers")
    with pytest.raises(UsageError, match="no valid key of numbers"):
        federate(at(keys))
    add_client(keys, "numbers")
    shutil.copy(others / "ca.crt", keys / "ca.crt")
    with pytest.raises(ArtifactError, match="vouches"):
        federate(at(keys))


def test_a_run_keeps_its_number_where_it_is_moved_and_a_new_one_at_its_place_has_another(tmp_path):
    (tmp_path / "run").mkdir()
    first = run_identity(tmp_path / "run")
    assert (len(first), run_identity(tmp_path / "run")) == (16, first)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    assert run_identity(tmp_path / "elsewhere") == first
    assert run_identity(tmp_path / "run") != first


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": 1}'])
def test_a_damaged_number_is_told(tmp_path, content):
    (tmp_path / IDENTITY).write_text(content)
    with pytest.raises(ArtifactError, match=IDENTITY):
        run_identity(tmp_path)
