"""The gateway under load, over TLS on loopback: its memory stays small, and honest clients are served."""

import contextlib
import http.client
import os
import random
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PullMessagesResponse
from flwr.proto.node_pb2 import Node

from fedproxy.artifacts import Manifest, write_json
from fedproxy.deployment import welcome
from fedproxy.deployment.certificates import load_private
from fedproxy.deployment.keys import add_client, client_key_file, init_keys, read_client_key
from fedproxy.deployment.welcome import introduce, public_pem
from tests.deployment.gateway_process import node_of
from tests.deployment.test_gateway import signed

pytestmark = pytest.mark.slow
HOSTILE, HELD, SECONDS = 512, 200, 20.0
MOST_BYTES = 256 << 20


class Hub:
    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        (folder / "proxy").mkdir()
        (folder / "proxy" / "model.safetensors").write_bytes(bytes(4096))
        write_json(folder / "proxy" / "config.json", {"model_type": "llama"})
        Manifest("proxy", "0" * 64, 4, [0, 3]).write(folder / "proxy")
        init_keys(folder / "keys")
        for name in names:
            add_client(folder / "keys", name)
        self.context = ssl.create_default_context(cafile=folder / "keys" / "ca.crt")
        command = [sys.executable, "-m", "tests.deployment.gateway_process", str(folder)]
        self.process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    @property
    def memory(self) -> int:
        """Bytes that the gateway's process has for itself, without the libraries that it has mapped."""
        return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) * 1024

    def key(self, name: str) -> ec.EllipticCurvePrivateKey:
        private = load_private(read_client_key(client_key_file(self.folder / "keys", name)).private_openssh)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        return private

    def connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=self.context)

    def post(self, path: str, body: bytes, key: ec.EllipticCurvePrivateKey | None = None) -> tuple[int, bytes]:
        headers = {} if key is None else {name.replace("_", "-"): value for name, value in signed(key).items()}
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    with contextlib.ExitStack() as stack:

        def begin(names: list[str]) -> Hub:
            hub = Hub(tmp_path, names)
            stack.callback(hub.process.wait)
            stack.callback(hub.process.kill)
            stack.callback(hub.process.stdout.close)
            return hub

        yield begin


def attack(hub: Hub, number: int, until: float) -> None:
    """One hostile connection after the other: silence, drips, floods, giant promises, a key without its signature."""
    chance = random.Random(number)
    key = {"flwr-public-key": "QQ==", "flwr-signature": "QQ==", "flwr-timestamp": "2026-01-01T00:00:00+00:00"}
    head = "".join(f"{name}: {value}\r\n" for name, value in key.items())
    openings = [
        b"",
        b"\x16\x03\x01\x02\x00" + bytes(200),
        b"POST /fedproxy/welcome HTTP/1.1\r\nContent-Length: 65536\r\n\r\n" + b"{" * 60_000,
        f"POST /v1/fleet/push-object HTTP/1.1\r\n{head}Content-Length: 16777216\r\n\r\n".encode() + b"x" * 100_000,
        b"GET /listing HTTP/1.1\r\nAuthorization: Bearer " + b"A" * 60_000,
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\n" + b"X-Drip: 1\r\n" * 50,
    ]
    while time.monotonic() < until:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            plain = stack.enter_context(socket.create_connection(("127.0.0.1", hub.port), 10))
            opening = chance.choice(openings)
            raw = plain
            if chance.random() < 0.7:
                raw = stack.enter_context(hub.context.wrap_socket(plain, server_hostname="127.0.0.1"))
            raw.settimeout(2.0)
            raw.sendall(opening)
            for _ in range(chance.randrange(6)):
                time.sleep(max(0.0, min(1.0, until - time.monotonic())))
                raw.sendall(b"x")


def test_hostile_connections_neither_fill_the_memory_nor_keep_a_client_out(start) -> None:
    hub = start(["bank"])
    until = time.monotonic() + SECONDS
    threads = [threading.Thread(target=attack, args=(hub, number, until)) for number in range(HOSTILE)]
    for thread in threads:
        thread.start()
    peak, welcomed = 0, 0
    bank = hub.key("bank")
    while time.monotonic() < until:
        peak = max(peak, hub.memory)
        with contextlib.suppress(OSError):
            welcomed += hub.post(welcome.PATH, introduce(bank, process="1" * 16).encode())[0] == 200
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    assert hub.process.poll() is None
    assert 0 < peak < MOST_BYTES, peak
    assert welcomed > 0
    assert hub.post(welcome.PATH, introduce(bank, process="1" * 16).encode())[0] == 200


def test_two_hundred_clients_are_held_at_once_and_all_get_their_orders(start) -> None:
    names = [f"client-{number}" for number in range(HELD)]
    hub = start(names)
    keys = {name: hub.key(name) for name in names}
    found: dict[str, list[str]] = {}

    def hold(name: str) -> None:
        public = public_pem(keys[name].public_key()).encode()
        enter = ActivateNodeRequest(public_key=public, heartbeat_interval=30.0).SerializeToString()
        assert hub.post("/v1/fleet/activate-node", enter, keys[name])[0] == 200
        request = PullMessagesRequest(node=Node(node_id=node_of(public))).SerializeToString()
        until = time.monotonic() + 90
        while name not in found and time.monotonic() < until:
            status, said = hub.post("/v1/fleet/pull-messages", request, keys[name])
            assert status == 200
            if messages := PullMessagesResponse.FromString(said).messages_list:
                found[name] = [messages[0].metadata.message_id]

    threads = [threading.Thread(target=hold, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    sockets = Path(f"/proc/{hub.process.pid}/fd")
    until = time.monotonic() + 60
    while len(list(sockets.iterdir())) < 2 * HELD and time.monotonic() < until:  # each is held, and asked for
        time.sleep(0.2)
    before = hub.memory
    time.sleep(8)
    after = hub.memory
    assert not found
    (hub.folder / "orders").touch()
    for thread in threads:
        thread.join()
    assert {name: [f"order-{node_of(public_pem(keys[name].public_key()).encode())}"] for name in names} == found
    assert after < MOST_BYTES
    assert after - before < 16 << 20
    assert os.path.exists(sockets)
