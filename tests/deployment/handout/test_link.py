"""Servers that send other than they should, in plaintext, so that every byte is at hand."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import socketserver
import threading
import time

import pytest

from fedproxy.deployment.handout import https, link
from fedproxy.deployment.handout.fetch import fetch_proxy
from fedproxy.deployment.keys import init_keys
from fedproxy.errors import ArtifactError, FederationError, UsageError

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


@pytest.fixture
def scripted(keys):
    """A function that starts a server which plays a script with each of its connections in turn, the last for ever."""
    with contextlib.ExitStack() as stack:

        def start(*scripts, tls=False):
            class Handler(socketserver.StreamRequestHandler):
                def handle(self):
                    server.met += 1
                    scripts[min(server.met, len(scripts)) - 1](self)

            server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
            server.daemon_threads, server.met = True, 0
            if tls:
                context = https.tls(keys / "server.crt", keys / "server.key")
                server.socket = context.wrap_socket(server.socket, server_side=True)
            threading.Thread(target=server.serve_forever, daemon=True, args=(0.01,)).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            return server

        yield start


def read_request(handler):
    """The body of a request; None where the client has closed."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = handler.rfile.readline()
        if not line:
            return None
        head += line
    found = re.search(rb"content-length: (\d+)", head.lower())
    return handler.rfile.read(int(found[1])) if found else b""


def once(handler):
    handler.wfile.write(answer(read_request(handler)))


def rudely(handler):
    read_request(handler)


def always(handler):
    while (body := read_request(handler)) is not None:
        handler.wfile.write(answer(body))


@pytest.mark.parametrize("tls", [False, True])
def test_a_kept_connection_that_was_closed_is_opened_anew_without_a_word(scripted, ca, tls):
    server = scripted(once, tls=tls)
    port = server.server_address[1]
    one = link.Link(f"http{'s' * tls}://127.0.0.1:{port}", None, ca if tls else None)
    for number in range(4):
        assert one.post("/x", f"{number}".encode(), 100) == (200, f"{number}".encode())
        time.sleep(0.05)  # until the server's end has arrived
    assert server.met == 4
    one.close()


def test_a_connection_that_is_closed_at_its_first_request_is_broken(scripted):
    server = scripted(rudely)
    one = link.Link(f"http://127.0.0.1:{server.server_address[1]}", None, None)
    with pytest.raises(link.BrokenLinkError):
        one.post("/x", b"1", 100)
    assert server.met == 1


def test_the_second_connection_is_the_last(scripted):
    server = scripted(once, rudely)
    one = link.Link(f"http://127.0.0.1:{server.server_address[1]}", None, None)
    assert one.post("/x", b"1", 100) == (200, b"1")
    with pytest.raises(link.BrokenLinkError):
        one.post("/x", b"2", 100)
    assert server.met == 2


def test_a_connection_that_is_aborted_is_not_opened_anew(scripted):
    waits = threading.Event()

    def first(handler):
        handler.wfile.write(answer(read_request(handler)))
        read_request(handler)
        waits.set()
        handler.rfile.read()

    server = scripted(first)
    one = link.Link(f"http://127.0.0.1:{server.server_address[1]}", None, None)
    one.post("/x", b"1", 100)
    threading.Thread(target=lambda: (waits.wait(10), one.abort()), daemon=True).start()
    with pytest.raises(link.BrokenLinkError):
        one.post("/x", b"2", 100)
    assert server.met == 1


@pytest.mark.parametrize("tls", [False, True])
def test_a_body_may_take_longer_than_the_silence_that_breaks_a_connection(scripted, ca, monkeypatch, tls):
    monkeypatch.setattr(link, "SILENCE_SECONDS", 0.5)
    body = bytes(16 << 20)

    def slowly(handler):
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        length = 0
        while handler.rfile.readline().strip():
            pass
        while length < len(body):
            length += len(handler.rfile.read(2 << 20))
            time.sleep(0.15)
        handler.wfile.write(answer(b"", length=8))
        for _ in range(8):
            time.sleep(0.15)
            handler.wfile.write(b"x")

    server = scripted(slowly, tls=tls)
    one = link.Link(f"http{'s' * tls}://127.0.0.1:{server.server_address[1]}", None, ca if tls else None)
    began = time.monotonic()
    assert one.post("/x", body, 100) == (200, b"x" * 8)
    assert time.monotonic() - began > 2 * 1.0
    one.close()


OWNER = "owner.test"
"""No name server knows it."""


@pytest.fixture
def way_out(scripted, monkeypatch):
    """A proxy that leads OWNER to a port of this machine: `way_out(port)`; `.seen` holds its requests' heads."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)

    def start(port):
        def relay(handler):
            head, unbuffered = b"", handler.connection.makefile("rb", 0)
            while not head.endswith(b"\r\n\r\n"):
                head += unbuffered.readline()
            proxy.seen.append(head.decode())
            with socket.create_connection(("127.0.0.1", port)) as out:
                if head.startswith(b"CONNECT "):
                    handler.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                else:
                    out.sendall(head)
                back = threading.Thread(target=pump, args=(out, handler.connection), daemon=True)
                back.start()
                pump(handler.connection, out)
                back.join(10)

        proxy = scripted(relay)
        proxy.seen, proxy.port = [], proxy.server_address[1]
        return proxy

    return start


def pump(source, target):
    with contextlib.suppress(OSError):
        while content := source.recv(1 << 16):
            target.sendall(content)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def owner(scripted, tmp_path):
    """A server over TLS, with a certificate for OWNER."""
    init_keys(tmp_path / "keys", [OWNER])
    context = https.tls(tmp_path / "keys" / "server.crt", tmp_path / "keys" / "server.key")

    def secure(handler):
        with context.wrap_socket(handler.connection, server_side=True) as secured:
            handler.rfile, handler.wfile = secured.makefile("rb"), secured.makefile("wb", buffering=0)
            once(handler)

    server = scripted(secure)
    server.port, server.ca = server.server_address[1], (tmp_path / "keys" / "ca.crt").read_bytes()
    return server


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_proxy_is_the_way_out(way_out, owner, monkeypatch, name, scheme):
    proxy = way_out(owner.port)
    monkeypatch.setenv(name, f"{scheme}127.0.0.1:{proxy.port}")
    one = link.Link(f"https://{OWNER}:9443", "secret-token", owner.ca)
    for body in (b"1", b"2"):  # the second on a connection of its own
        assert one.post("/x", body, 100) == (200, body)
    assert [head.split()[:2] for head in proxy.seen] == [["CONNECT", f"{OWNER}:9443"]] * 2
    assert "secret-token" not in "".join(proxy.seen)
    one.close()


def test_the_proxys_credentials_are_for_the_proxy_alone(way_out, owner, monkeypatch):
    proxy = way_out(owner.port)
    monkeypatch.setenv("HTTPS_PROXY", f"http://b%40nk:p%3Aw@127.0.0.1:{proxy.port}")
    one = link.Link(f"https://{OWNER}:9443", None, owner.ca)
    assert one.post("/x", b"1", 100) == (200, b"1")
    (said,) = re.findall(r"(?i)proxy-authorization: basic (\S+)", proxy.seen[0])
    assert base64.b64decode(said) == b"b@nk:p:w"
    one.close()


def test_plaintext_goes_through_a_proxy_by_whole_addresses(way_out, scripted, monkeypatch):
    server = scripted(always)
    proxy = way_out(server.server_address[1])
    monkeypatch.setenv("http_proxy", f"http://a:b@127.0.0.1:{proxy.port}")
    one = link.Link(f"http://{OWNER}:9443", None, None)
    assert one.post("/x", b"1", 100) == (200, b"1")
    assert proxy.seen[0].startswith(f"POST http://{OWNER}:9443/x HTTP/1.1\r\nHost: {OWNER}:9443\r\n")
    assert "proxy-authorization: basic" in proxy.seen[0].lower()
    one.close()


@pytest.mark.parametrize("spared", ["127.0.0.1", "127.0.0.1,example.org", "*"])
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_what_is_spared_needs_no_proxy(way_out, scripted, monkeypatch, name, spared):
    server = scripted(always)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv(name, spared)
    one = link.Link(f"http://127.0.0.1:{server.server_address[1]}", None, None)
    assert one.post("/x", b"1", 100) == (200, b"1")
    one.close()


def test_a_proxy_that_refuses_is_named_without_its_password(way_out, scripted, monkeypatch):
    proxy = scripted(lambda handler: handler.wfile.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"))
    port = proxy.server_address[1]
    monkeypatch.setenv("HTTPS_PROXY", f"http://bank:secret@127.0.0.1:{port}")
    with pytest.raises(link.BrokenLinkError) as broken:
        link.Link(f"https://{OWNER}:9443", None, None).post("/x", b"", 100)
    assert "407" in str(broken.value)
    assert f"127.0.0.1:{port}" in str(broken.value)
    assert "secret" not in str(broken.value)


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY"])
@pytest.mark.parametrize(
    "url", ["socks5://bank:secret@h:1", "socks://h:1", "https://h:1", "http://", "http://h:x", "http://[h"]
)
def test_a_proxy_of_another_kind_is_refused(way_out, monkeypatch, name, url):
    monkeypatch.setenv(name, url)
    with pytest.raises(UsageError) as refused:
        link.Link(f"https://{OWNER}:9443", None, None)
    assert name.upper() in str(refused.value)
    assert "secret" not in str(refused.value)
