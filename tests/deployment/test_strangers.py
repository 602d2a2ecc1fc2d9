"""None of these gets in, each is told why, and the federation of the others goes on."""

import http.client
import os
import re
import signal
import ssl
import sys
from pathlib import Path

import pytest

from fedproxy.deployment.audit import AUDIT, check
from fedproxy.deployment.keys import add_client, client_key_file, init_keys, new_key, revoke_client, rotate_client
from tests.deployment.conftest import Federation, eventually
from tests.docs.terminal import free_port

pytestmark = pytest.mark.long
FUTURE = """
import sys
import fedproxy.federation.protocol as protocol
protocol.PROTOCOL += 1
from fedproxy.cli import main
main(sys.argv[1:])
"""
CLOSED = [
    *(f"/v1/control/{name}" for name in ("start-run", "list-runs", "stop-run", "register-node", "list-nodes")),
    *(f"/v1/runtime/{name}" for name in ("acquire-task", "pull-task-input", "push-messages")),
    *(f"/v1/fleet/{name}" for name in ("register-node", "unregister-node", "../control/start-run")),
    "/flwr.proto.Control/StartRun",
    "/",
]


def ask(address: str, ca: Path, path: str) -> int:
    """The status that a stranger gets for a POST."""
    host, _, port = address.partition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=20, context=ssl.create_default_context(cafile=ca))
    try:
        connection.request("POST", path, b"\x0a\x00", {"Content-Type": "application/protobuf"})
        return connection.getresponse().status
    finally:
        connection.close()


def test_strangers_stay_outside(federation, tmp_path) -> None:
    one: Federation = federation(rounds=8, quorum=2)
    lost = tmp_path / "lost.key"
    lost.write_bytes(client_key_file(one.keys, "colours").read_bytes())
    revoke_client(one.keys, "colours")
    add_client(one.keys, "colours")
    init_keys(tmp_path / "others")
    new_key(tmp_path / "unknown.key")
    ca, other, unknown = one.keys / "ca.crt", tmp_path / "others" / "ca.crt", tmp_path / "unknown.key"

    owner = one.serve("run")
    clients = {name: one.join(name) for name in ("animals", "colours")}
    supernode = ["flower-supernode", "--superlink", one.address, "--root-certificates", str(ca)]
    supernode = [str(Path(sys.executable).parent / supernode[0]), *supernode[1:], "--port", str(free_port())]
    strangers = {
        "is not registered": (4, one.join("numbers", "--ca", ca, key=unknown, log="unknown")),
        "It speaks TLS if it was started with --keys": (
            4,
            one.join("numbers", "--insecure", "--name", "numbers", log="plaintext"),
        ),
        "is not the server that the CA certificate vouches for": (
            4,
            one.join("numbers", "--ca", other, log="other-ca"),
        ),
        "was revoked": (4, one.join("numbers", key=lost, log="revoked")),
        "protocol": (3, one.join("numbers", log="future", command=[sys.executable, "-c", FUTURE])),
    }
    assert {path: ask(one.address, ca, path) for path in CLOSED} == dict.fromkeys(CLOSED, 401)
    for reason, (code, stranger) in strangers.items():
        said = stranger.ends(code)
        assert reason in said, said
        assert "Traceback" not in said, said
    # Flower's own SuperNode ends on the gateway's 401, and says no more than this.
    raw = one.start("supernode", "--auth-supernode-private-key", unknown, command=supernode)
    said = raw.ends()
    assert "SuperNode terminated gracefully" in said, said
    assert "SuperNode ID" not in said, said

    assert not one.events("run", "round_opened")  # it still waits for its third client
    clients["numbers"] = one.join("numbers")
    one.opened("run", 2)
    revoke_client(one.keys, "colours")
    assert "This key was revoked" in clients.pop("colours").ends(4)
    owner.ends()
    for client in clients.values():
        assert "The federation is complete" in client.ends()
    assert set(one.record("run", 8)["clients"]) == {"animals", "numbers"}
    assert eventually(lambda: not owner.family())
    noted = [(event["event"], event.get("client")) for event in check(tmp_path / "run" / AUDIT)]
    known = [("registered", name) for name in ("animals", "colours", "numbers")]
    assert [pair for pair in noted if pair[0] in ("registered", "started", "revoked", "ended")] == [
        *known,
        ("started", None),
        ("revoked", "colours"),
        ("ended", None),
    ]


def test_a_key_that_is_registered_or_rotated_while_the_federation_runs_is_asked_from_the_next_round_on(
    federation, tmp_path
) -> None:
    one: Federation = federation(rounds=500, quorum=2, max_norm_ratio=1000.0)
    one.experiment.write_text(re.sub(r"(\[\[client\]\]\n.*\n.*\n)+", "", one.experiment.read_text()))
    revoke_client(one.keys, "numbers")
    owner = one.serve("run")
    old, _ = [one.join(name) for name in ("animals", "colours")]
    one.opened("run", 2)
    add_client(one.keys, "numbers")
    newcomer = one.join("numbers")
    assert eventually(lambda: any("numbers" in event["asked"] for event in one.events("run", "round_opened")[-1:]))
    asked = one.events("run", "round_opened")[-1]["round"]
    one.opened("run", asked + 1)
    assert set(one.record("run", asked)["clients"]) == {"animals", "colours", "numbers"}
    assert newcomer.code is None
    rotate_client(one.keys, "animals")
    assert "This key was revoked" in old.ends(4)
    asked = one.events("run", "round_opened")[-1]["round"]
    one.opened("run", asked + 2)
    one.join("animals", log="rotated")
    assert eventually(lambda: "animals" in one.events("run", "round_opened")[-1]["asked"])
    asked = one.events("run", "round_opened")[-1]["round"]
    one.opened("run", asked + 1)
    assert set(one.record("run", asked)["clients"]) == {"animals", "colours", "numbers"}
    os.kill(owner.pid, signal.SIGTERM)
    assert "interrupted" in owner.ends(130)
    known = [event for event in check(tmp_path / "run" / AUDIT) if event.get("client") == "animals"]
    animals = [event for event in known if event["event"] in ("registered", "joined", "revoked")]
    assert [event["event"] for event in animals] == ["registered", "joined", "revoked", "registered", "joined"]
    assert animals[0]["key"] == animals[1]["key"] == animals[2]["key"]
    assert animals[2]["key"] != animals[3]["key"] == animals[4]["key"]
