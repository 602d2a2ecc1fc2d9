"""Servers that send other than they should, in plaintext, so that every byte is at hand."""

import hashlib
import json
import socketserver
import threading
import time

import pytest

from fedproxy.deployment.handout import link
from fedproxy.deployment.handout.fetch import fetch_proxy
from fedproxy.errors import ArtifactError, FederationError

BODY = b"0123456789" * 1000
SHA = hashlib.sha256(BODY).hexdigest()


def listing(name="model.safetensors", size=10_000, sha256=SHA):
    return json.dumps({"format": 1, "files": [{"name": name, "size": size, "parts": [[0, size, sha256]]}]}).encode()


def answer(body, status="200 OK", length=None, **headers):
    headers = {"Content-Length": len(body) if length is None else length, **headers}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.fixture
def hostile():
    """A function that starts a server: it answers `/listing` with one string of bytes and all else with another."""
    servers = []

    def start(first, rest):
        class Handler(socketserver.StreamRequestHandler):
            def read_request(self):
                try:
                    line = self.rfile.readline()
                    while self.rfile.readline().strip():
                        pass
                except OSError:
                    return b""
                return line

            def handle(self):
                while line := self.read_request():
                    reply = first if b" /listing " in line else rest
                    server.asked += 1
                    try:
                        for piece in [reply] if isinstance(reply, bytes) else reply():
                            self.wfile.write(piece)
                    except OSError:
                        return
                    if not isinstance(reply, bytes) or b"Connection: close" in reply:
                        return

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.asked = True, 0
        threading.Thread(target=server.serve_forever, daemon=True, args=(0.05,)).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def get(server, cache, identity=None, first=None):
    identity = identity or hashlib.sha256(first or listing()).hexdigest()
    return fetch_proxy(f"http://127.0.0.1:{server.server_address[1]}", "token", identity, cache, None)


def test_the_honest_reply_is_taken(hostile, tmp_path):
    assert (get(hostile(answer(listing()), answer(BODY)), tmp_path) / "model.safetensors").read_bytes() == BODY


PARTS = {
    "wrong bytes": (answer(BODY[:-1] + b"x"), ArtifactError, "another SHA-256"),
    "more bytes": (answer(BODY + b"x"), ArtifactError, "10001 bytes are announced"),
    "fewer bytes": (answer(BODY[:-1]), ArtifactError, "9999 bytes are announced"),
    "short": (answer(BODY[:-1], length=len(BODY), Connection="close"), FederationError, "206|attempts failed"),
    "no length": (b"HTTP/1.1 200 OK\r\n\r\n" + BODY, FederationError, "how long"),
    "chunked": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffff\r\n" + BODY, FederationError, "how long"),
    "negative length": (answer(BODY, length=-5), FederationError, "how long"),
    "redirect": (answer(b"", "302 Found", Location="http://127.0.0.1:1/"), FederationError, "redirects"),
    "not found": (answer(b"", "404 Not Found"), ArtifactError, "another proxy"),
    "busy": (answer(b"", "503 Busy"), FederationError, "6 attempts failed: it is busy"),
    "odd status": (answer(BODY, "206 Partial"), FederationError, "206"),
    "no HTTP": (b"hello\r\n", FederationError, "attempts failed"),
    "long header": (b"HTTP/1.1 200 OK\r\nA: " + b"a" * 100_000, FederationError, "attempts failed"),
    "many headers": (b"HTTP/1.1 200 OK\r\n" + b"A: a\r\n" * 200 + b"\r\n", FederationError, "attempts failed"),
}


@pytest.mark.parametrize("kind", PARTS)
def test_hostile_parts(hostile, tmp_path, kind):
    reply, error, words = PARTS[kind]
    server = hostile(answer(listing()), reply)
    with pytest.raises(error, match=words) as raised:
        get(server, tmp_path)
    assert "127.0.0.1" in str(raised.value)
    assert SHA[:12] in str(raised.value)
    assert server.asked <= 1 + 6 * 2
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


LISTINGS = {
    "another": (answer(listing(size=5)), ArtifactError, "other than"),
    "large": (answer(b"", length=1 << 40), ArtifactError, "limit"),
    "short": (answer(b"{", length=500, Connection="close"), FederationError, "attempts failed"),
    "redirect": (answer(b"", "301 Moved"), FederationError, "redirects"),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_hostile_listings(hostile, tmp_path, kind):
    reply, error, words = LISTINGS[kind]
    with pytest.raises(error, match=words):
        get(hostile(reply, b""), tmp_path)


@pytest.mark.parametrize(
    "content",
    [listing("../../x"), listing("/x"), b"{", b"[" * 100_000, b"\xff", b'{"format": 1}', listing(size=1 << 60)],
)
def test_a_listing_with_the_right_hash_and_bad_content(hostile, tmp_path, content):
    with pytest.raises(ArtifactError, match="listing"):
        get(hostile(answer(content), b""), tmp_path / "cache", first=content)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_an_endless_body_is_not_read_to_the_end(hostile, tmp_path):
    def endless():
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n"
        while True:
            yield b"x" * 10_000

    with pytest.raises(ArtifactError, match="another SHA-256"):
        get(hostile(answer(listing()), endless), tmp_path)


def test_a_server_that_falls_silent(hostile, tmp_path, monkeypatch):
    monkeypatch.setattr(link, "SILENCE_SECONDS", 0.1)

    def silent():
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\nx"
        time.sleep(1)

    with pytest.raises(FederationError, match=r"timed out|206"):
        get(hostile(answer(listing()), silent), tmp_path)


@pytest.mark.parametrize("content", [b"", BODY[:-1]])
def test_an_answer_cut_short_is_a_broken_link(hostile, content):
    server = hostile(b"", answer(content, length=len(BODY), Connection="close"))
    with pytest.raises(link.BrokenLinkError, match="IncompleteRead"):
        link.Link(f"http://127.0.0.1:{server.server_address[1]}", None, None).post("/x", b"", 1 << 20)
