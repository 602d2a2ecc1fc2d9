"""A member attacks a running federation with its own good key; the others' bits stay what they are without it."""

import contextlib
import http.client
import os
import random
import re
import shutil
import signal
import ssl
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest

from fedproxy.deployment import welcome
from fedproxy.deployment.audit import AUDIT, check
from fedproxy.deployment.certificates import load_private
from fedproxy.deployment.flower.requests import FLEET
from fedproxy.deployment.keys import add_client, client_key_file, read_client_key
from fedproxy.deployment.welcome import introduce, public_pem
from tests.deployment.conftest import WORDS, Federation
from tests.deployment.mallory import spoilt
from tests.deployment.test_gateway import signed

MUTATIONS, PATIENCE = 100, 3.0
FROM = "127.0.0.2"
"""The attacker's address: one that is refused again and again has to wait, and the honest clients are at another."""


class Mallory:
    """Posts with a member's key."""

    def __init__(self, one: Federation) -> None:
        self._port = int(one.address.rpartition(":")[2])
        self._context = ssl.create_default_context(cafile=one.keys / "ca.crt")
        key = load_private(read_client_key(client_key_file(one.keys, "mallory")).private_openssh)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self.key, self.pem = key, public_pem(key.public_key())
        self.said: Counter[tuple[str, int]] = Counter()

    def connect(self) -> http.client.HTTPSConnection:
        where = ("127.0.0.1", self._port)
        return http.client.HTTPSConnection(*where, timeout=PATIENCE, context=self._context, source_address=(FROM, 0))

    def post(self, connection: http.client.HTTPSConnection, path: str, body: bytes) -> bytes:
        """What is answered; nothing if that takes too long, or the connection is closed."""
        headers = {name.replace("_", "-"): value for name, value in signed(self.key).items()}
        try:
            connection.request("POST", path, body, {**headers, "Content-Type": "application/protobuf"})
            answer = connection.getresponse()
            said = answer.read()
            self.said[path, answer.status] += 1
            return said
        except (OSError, http.client.HTTPException):
            connection.close()
            self.said[path, 0] += 1
            return b""

    def messages(self) -> dict[str, Callable[[], bytes]]:
        """Every message that a member can send, as it should be or nearly, with the number of its own node."""
        entering = ActivateNodeRequest(public_key=self.pem.encode(), heartbeat_interval=30)
        with contextlib.closing(self.connect()) as connection:
            entered = self.post(connection, FLEET + "activate-node", entering.SerializeToString())
        number = ActivateNodeResponse.FromString(entered).node_id
        assert number
        node, tree = Node(node_id=number), ObjectTree(object_id="a" * 64, children=[ObjectTree(object_id="b" * 64)])
        heads = [
            {"src_node_id": number, "dst_node_id": 1, "reply_to_message_id": "c" * 64},
            {"src_node_id": 1, "dst_node_id": 1, "message_type": "train", "ttl": 1e9},
            {"src_node_id": number, "dst_node_id": 1, "reply_to_message_id": "c" * 64, "run_id": 2**63},
        ]
        requests = {
            "activate-node": [entering],
            "register-node": [RegisterNodeFleetRequest(public_key=self.pem.encode())],
            "deactivate-node": [DeactivateNodeRequest(node_id=number + 1)],
            "unregister-node": [UnregisterNodeFleetRequest(node_id=number + 1)],
            "send-node-heartbeat": [SendNodeHeartbeatRequest(node=node, heartbeat_interval=1e30)],
            "get-run": [GetRunRequest(node=node, run_id=1)],
            "pull-messages": [PullMessagesRequest(node=Node(node_id=1))],
            "pull-object": [PullObjectRequest(node=node, run_id=1, object_id="b" * 64)],
            "confirm-message-received": [ConfirmMessageReceivedRequest(node=node, message_object_id="a" * 64)],
            "push-messages": [
                PushMessagesRequest(
                    node=node, messages_list=[Message(metadata=Metadata(**head))], message_object_trees=[tree]
                )
                for head in heads
            ],
            "push-object": [PushObjectRequest(node=node, run_id=1, object_id="b" * 64, object_content=b"x" * 1000)],
        }
        chance = random.Random(0)
        made = {
            FLEET + name: lambda those=those: chance.choice(those).SerializeToString()
            for name, those in requests.items()
        }
        return made | {welcome.PATH: lambda: introduce(self.key).encode()}

    def attack(self) -> None:
        """Each message as it is, and spoilt a hundred times; all kinds at once."""
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(self._attack, *zip(*self.messages().items(), strict=True)))

    def _attack(self, path: str, make: Callable[[], bytes]) -> None:
        chance = random.Random(path)
        with contextlib.closing(self.connect()) as connection:
            self.post(connection, path, make())
            for _ in range(MUTATIONS):
                self.post(connection, path, spoilt(make(), chance))


@pytest.mark.long
def test_a_member_that_attacks_changes_no_bit_of_the_others(federation: Callable[..., Federation]) -> None:
    one = federation(rows=8, rounds=500, quorum=3, strikes=100, deadline="60s", max_norm_ratio=1000.0)
    text = one.experiment.read_text()
    add_client(one.keys, "mallory")
    shutil.copy(one.folder / "animals.jsonl", one.folder / "mallory.jsonl")
    table = '[[client]]\nname = "mallory"\ndata = "mallory.jsonl"\n'
    one.experiment.write_text(text.replace("[train]", f"{table}[train]", 1))
    owner = one.serve("attacked")
    honest = [one.join(name, cache=f"cache-{name}") for name in WORDS]
    spoiling = [sys.executable, str(Path(__file__).with_name("mallory.py"))]
    one.join("mallory", cache="cache-mallory", command=spoiling)
    one.opened("attacked", 2)
    mallory = Mallory(one)
    mallory.attack()
    assert [client.code for client in (owner, *honest)] == [None] * 4
    os.kill(owner.pid, signal.SIGTERM)
    said = owner.ends(130)
    assert not {"Traceback", "bug"} & {*re.findall(r"\w+", said)}

    answered = Counter()
    for (path, status), count in mallory.said.items():
        answered[path] += count if status else 0
    assert min(answered.values()) > MUTATIONS // 2, mallory.said
    rounds = len(one.events("attacked", "round_closed"))
    one.experiment.write_text(text.replace("rounds = 500", f"rounds = {rounds}"))
    one.federate("inline").ends()
    found = one.rounds("attacked")
    for name, content in one.rounds("inline").items():
        assert not name.endswith(".safetensors") or found[name] == content
    for number in range(1, rounds + 1):
        record = one.record("attacked", number)
        left_out = {fault["client"] for fault in record["refused"] + record["quarantined"]}
        assert set(record["clients"]) == set(WORDS)
        assert left_out | {*record["dropouts"]} == {*record["asked"]} - {*WORDS}
    noted = Counter((event["event"], event.get("client")) for event in check(one.folder / "attacked" / AUDIT))
    assert noted["left out", "mallory"]
    assert noted["refused", "mallory"]
    assert {client for kind, client in noted if kind in ("left out", "refused")} <= {"mallory", None}
