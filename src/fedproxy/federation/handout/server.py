"""Hands out a proxy over HTTPS: parts by their hash to those who hold a token, never a file by its path."""

import contextlib
import hmac
import logging
import os
import re
import secrets
import socket
import socketserver
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from fedproxy.errors import ArtifactError, FedproxyError, UsageError
from fedproxy.federation.handout.parts import BUFFER_BYTES, Listing, opened

log = logging.getLogger(__name__)

CONNECTIONS = 512
"""Connections at one time; one more is closed at once, and its client tries again."""
HANDSHAKE_SECONDS, REQUEST_SECONDS, PIECE_SECONDS = 15.0, 30.0, 60.0
"""How long a client may take for its TLS handshake, its next request, and for taking a buffer's bytes."""
_PART = re.compile(r"/parts/([0-9a-f]{64})")
_RANGE = re.compile(r"bytes=([0-9]{1,19})-")
MOST_POSTED_BYTES = 16 << 20
"""The largest body of a POST request; Flower cuts what it sends into pieces of 5 MiB."""


@dataclass(frozen=True)
class Answer:
    """The answer to a POST request."""

    status: HTTPStatus
    kind: str
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class HandoutServer:
    """Serves one proxy in threads of its own, from `start` to `close`.

    Every request carries a token, and whoever `allowed` no longer lets in is refused from the next request on. Files
    are opened once, so what is put in their place later does not leave.
    """

    def __init__(
        self,
        proxy: Path,
        listing: Listing,
        host: str,
        port: int,
        certificate: Path | None,
        key: Path | None,
        allowed: Callable[[str], bool],
    ) -> None:
        """Open the files and the port.

        Args:
            proxy: The proxy.
            listing: What `describe` made of it.
            host: Address to listen at.
            port: Port to listen at; 0 for any that is free.
            certificate: The server's certificate (PEM); plaintext without it, for runs on loopback.
            key: Its private key.
            allowed: Whether a client may fetch, by the name that its token was issued to; asked at every request.

        Raises:
            ArtifactError: the proxy is not the one described, or certificate and key cannot be used.
            UsageError: the address cannot be listened at.
        """
        self.listing = listing
        self.allowed = allowed
        self.sent: Counter[str] = Counter()
        """Bytes of parts sent, by client."""
        self._tokens: dict[str, str] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        context = None if certificate is None else _tls(certificate, key)
        with contextlib.ExitStack() as stack:
            handles = stack.enter_context(opened(proxy))
            sizes = {name: os.fstat(handle).st_size for name, handle in handles.items()}
            if sizes != {file.name: file.size for file in listing.files}:
                raise ArtifactError(f"{proxy} was changed since its parts were listed. Start again.")
            self.places = {
                part.sha256: (handles[file.name], part.offset, part.length)
                for file in listing.files
                for part in file.parts
            }
            try:
                self._server = _Server(self, (host, port), context)
            except OSError as error:
                raise UsageError(f"cannot listen at {host}:{port} ({error.strerror or error}).") from error
            stack.callback(self._server.server_close)
            self._open = stack.pop_all()

    @property
    def port(self) -> int:
        """The port it listens at."""
        return int(self._server.server_address[1])

    def issue(self, name: str) -> str:
        """Return the token of a client; the same as long as the server lives.

        A name that another key may inherit should hold the key's fingerprint, or whoever had the token before has it
        again.
        """
        with self._lock:
            return self._tokens.setdefault(name, secrets.token_urlsafe(32))

    def holder(self, token: str) -> str | None:
        """The client that a token was issued to; compared in constant time."""
        with self._lock:
            tokens = list(self._tokens.items())
        found = None
        for name, issued in tokens:
            if hmac.compare_digest(issued.encode(), token.encode()):
                found = name
        return found

    def count_sent(self, name: str, count: int) -> None:
        """Add to `sent`."""
        with self._lock:
            self.sent[name] += count

    def post(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Answer a POST request; nothing is taken here."""
        return Answer(HTTPStatus.NOT_FOUND, "text/plain", b"nothing is taken here\n")

    def forget(self) -> None:
        """Called in a connection's thread when the connection ends."""

    def start(self) -> "HandoutServer":
        """Begin to serve."""
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="handout", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop, break off what is being sent, and close port and files."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.close_connections()
        self._open.close()

    def __enter__(self) -> "HandoutServer":
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()


def _tls(certificate: Path, key: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ArtifactError(f"{certificate} and {key} are no certificate with its key: {error}.") from error
    return context


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread a connection, so many at most; a connection that lets its deadline pass is shut."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, owner: HandoutServer, address: tuple[str, int], context: ssl.SSLContext | None) -> None:
        self.owner, self._context = owner, context
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        self._deadlines: dict[socket.socket, float] = {}
        self._closing = False
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            if self._context is not None:
                request = self._context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
                self.allow(request, HANDSHAKE_SECONDS)
                request.do_handshake()
            self.finish_request(request, client_address)
        except OSError as error:
            log.debug("%s: %s", client_address, error)
        finally:
            self.owner.forget()
            self._deadlines.pop(request, None)
            self.shutdown_request(request)
            self._slots.release()

    def allow(self, connection: socket.socket, seconds: float) -> None:
        """Give a connection so much time from now; none once the server closes."""
        self._deadlines[connection] = time.monotonic() + seconds
        if self._closing:
            _shut(connection)

    def service_actions(self) -> None:
        now = time.monotonic()
        for connection, deadline in list(self._deadlines.items()):
            if now > deadline:
                _shut(connection)

    def close_connections(self) -> None:
        """Shut every connection and wait for its thread, which reads the open files."""
        if self._closing:
            return
        self._closing = True
        for connection in list(self._deadlines):
            _shut(connection)
        for _ in range(CONNECTIONS):
            self._slots.acquire()


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Not SSLSocket's own method, which pulls the TLS state from under the thread that uses it.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fedproxy", ""
    error_content_type, error_message_format = "text/plain", "%(message)s\n"
    server: _Server

    def handle_one_request(self) -> None:
        self.server.allow(self.connection, REQUEST_SECONDS)
        super().handle_one_request()

    def do_GET(self) -> None:
        owner = self.server.owner
        self.server.allow(self.connection, PIECE_SECONDS)
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            self.send_error(HTTPStatus.BAD_REQUEST, "a request has no body")
            return
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        name = owner.holder(token) if kind == "Bearer" else None
        if name is None:
            self.send_error(HTTPStatus.UNAUTHORIZED, "no valid token")
            return
        try:
            allowed = owner.allowed(name)
        except FedproxyError as error:
            log.warning("%s cannot be let in or refused: %s", name, error)
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "try again")
            return
        if not allowed:
            self.send_error(HTTPStatus.FORBIDDEN, "this client may not fetch, its key may be revoked")
        elif self.path == "/listing":
            self._head(HTTPStatus.OK, len(owner.listing.content))
            self.wfile.write(owner.listing.content)
        elif (part := _PART.fullmatch(self.path)) and part[1] in owner.places:
            self._send_part(name, *owner.places[part[1]])
        else:
            self.send_error(HTTPStatus.NOT_FOUND, "no such part")

    def do_POST(self) -> None:
        self.server.allow(self.connection, PIECE_SECONDS)
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not length.isdecimal() or int(length) > MOST_POSTED_BYTES:
            self.close_connection = True
            self.send_error(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body states its length, {MOST_POSTED_BYTES} at most"
            )
            return
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            return
        self.server.allow(self.connection, 2 * PIECE_SECONDS)
        answer = self.server.owner.post(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        self.send_response(answer.status)
        headers = {"Content-Type": answer.kind, "Content-Length": str(len(answer.content)), **answer.headers}
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(answer.content)

    def _head(self, status: HTTPStatus, length: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(length))
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()

    def _send_part(self, name: str, handle: int, offset: int, length: int) -> None:
        found = _RANGE.fullmatch(self.headers.get("Range", "bytes=0-"))
        begin = int(found[1]) if found else 0
        if begin >= length:
            self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"the part has {length} bytes")
            return
        if begin:
            self._head(HTTPStatus.PARTIAL_CONTENT, length - begin, Content_Range=f"bytes {begin}-{length - 1}/{length}")
        else:
            self._head(HTTPStatus.OK, length)
        buffer = memoryview(bytearray(min(BUFFER_BYTES, length - begin)))
        while begin < length:
            count = os.preadv(handle, [buffer[: length - begin]], offset + begin)
            if count == 0:
                raise OSError("the proxy's file was cut short while it was sent")
            self.server.allow(self.connection, PIECE_SECONDS)
            self.wfile.write(buffer[:count])
            self.server.owner.count_sent(name, count)
            begin += count

    def log_message(self, format: str, *arguments: Any) -> None:
        log.debug(format, *arguments)
