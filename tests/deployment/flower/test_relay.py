"""Nothing passes the relay but what its own SuperNode signed, and all that passes is told first, to the byte."""

import contextlib
import http.client
import socket
import socketserver
import ssl
import threading
import time

import pytest

from fedproxy.deployment.certificates import make_key
from fedproxy.deployment.flower.relay import Relay
from fedproxy.deployment.handout import https
from fedproxy.deployment.handout.link import Link, whole_request
from fedproxy.deployment.keys import init_keys
from fedproxy.deployment.welcome import public_pem
from fedproxy.errors import ResourceError
from tests.deployment import test_gateway

KEY = make_key()
PUBLIC = public_pem(KEY.public_key())
PATH = "/v1/fleet/push-object"


def signed(key, **how):
    return {name.replace("_", "-"): value for name, value in test_gateway.signed(key, **how).items()}


class Server(socketserver.ThreadingTCPServer):
    """Answers every request over TLS with its body twice, with a pause between; `seen` is all that came."""

    daemon_threads = True

    def __init__(self, keys):
        super().__init__(("127.0.0.1", 0), None)
        self.context, self.seen, self.left = https.tls(keys / "server.crt", keys / "server.key"), bytearray(), 0

    def finish_request(self, request, address):
        with contextlib.suppress(OSError), self.context.wrap_socket(request, server_side=True) as connection:
            held = bytearray()
            while piece := connection.recv(1 << 16):
                self.seen += piece
                held += piece
                while length := whole_request(held):
                    body = bytes(held[:length]).partition(b"\r\n\r\n")[2]
                    del held[:length]
                    connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {2 * len(body)}\r\n\r\n".encode() + body)
                    time.sleep(0.1)
                    connection.sendall(body)
            self.left += 1


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys") / "keys"
    init_keys(folder)
    return folder


@pytest.fixture
def server(keys):
    with Server(keys) as one:
        threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
        yield one
        one.shutdown()


@pytest.fixture
def start(server, keys, tmp_path):
    """A function that starts a relay to the server; given who is told of each request."""
    with contextlib.ExitStack() as stack:

        def begin(on_request, key=PUBLIC):
            url, ca = f"https://127.0.0.1:{server.server_address[1]}", (keys / "ca.crt").read_bytes()
            relay = Relay(tmp_path, Link(url, None, ca), on_request, key)
            relay.start()
            stack.callback(relay.close)
            return relay

        yield begin


def connect(relay):
    context = ssl.create_default_context(cadata=relay.ca.decode())
    return http.client.HTTPSConnection("127.0.0.1", relay.port, timeout=20, context=context)


def ask(connection, body, headers, path=PATH, method="POST"):
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_what_passes_is_told_first_to_the_byte(server, start):
    told = bytearray()

    def tell(request):
        assert not server.seen[len(told) :]
        told.extend(request)

    connection = connect(start(tell))
    for body in (b"x", bytes(range(256)) * 5000, b""):  # the last on the same connection as the first
        assert ask(connection, body, signed(KEY)) == (200, 2 * body)
        assert server.seen == told
    connection.close()
    deadline = time.monotonic() + 10
    while not server.left and time.monotonic() < deadline:  # the server is told that the SuperNode has left
        time.sleep(0.01)
    assert server.left == 1


@pytest.mark.parametrize(
    ("how", "path", "method"),
    [
        ({}, PATH, "POST"),
        (signed(make_key()), PATH, "POST"),
        (signed(KEY, by=make_key()), PATH, "POST"),
        (signed(KEY, age=1000.0), PATH, "POST"),
        (signed(KEY), "/fedproxy/welcome", "POST"),
        ({}, "elsewhere:1", "CONNECT"),
        (signed(KEY), PATH, "GET"),
        (signed(KEY) | {"Transfer-Encoding": "chunked"}, PATH, "POST"),
        (signed(KEY) | {"Content-Length": "99999999"}, PATH, "POST"),
        (signed(KEY), "/" + "x" * 100_000, "POST"),
    ],
)
def test_nothing_else_passes(server, start, how, path, method):
    told = []
    connection = connect(start(told.append))
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(connection, b"x", how, path, method)
    connection.close()
    assert not told
    assert not server.seen


def test_what_cannot_be_noted_stays_here(server, start):
    def full(request):
        raise ResourceError("the disk is full")

    connection = connect(start(full))
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(connection, b"x", signed(KEY))
    connection.close()
    assert not server.seen


def test_half_a_request_stays_here(server, start):
    told = []
    relay = start(told.append, None)
    with socket.create_connection(("127.0.0.1", relay.port)) as node:
        node.sendall(f"POST {PATH} HTTP/1.1\r\nContent-Length: 10\r\n\r\n12345".encode())
        time.sleep(0.3)
    assert not told
    assert not server.seen
    relay.close()
    with pytest.raises(OSError):  # noqa: PT011
        socket.create_connection(("127.0.0.1", relay.port), 1.0)
