"""A small HTTPS server: a thread a connection, so many at most, and none that a silent client holds for ever."""

import contextlib
import logging
import re
import select
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from fedproxy.deployment.certificates import check_certificate, read_small
from fedproxy.deployment.limits import Allowance, Places, neighbourhood
from fedproxy.errors import ArtifactError, FedproxyError
from fedproxy.foreign import plain

log = logging.getLogger(__name__)

CONNECTIONS, CONNECTIONS_EACH = 1024, 768
"""Connections at one time, and those of one address; one more is closed at once, and its client tries again."""
STRANGERS_AT_ONCE, STRANGERS_A_SECOND, LONGEST_DELAY = 60, 1.0, 5.0
"""An address has so many refusals at once and a second; the answer to one more is held back for some seconds."""
HANDSHAKE_SECONDS, REQUEST_SECONDS, PIECE_SECONDS = 15.0, 30.0, 60.0
"""How long a client may take for its TLS handshake, its next request, and for a piece of a body."""
PIECE_BYTES = 64 << 10

_LENGTH = re.compile("[0-9]{1,15}")
_HERE = "127.0.0.1"
"""Where the SuperLink listens, with the same certificate."""


@dataclass(frozen=True)
class Answer:
    """The answer to a POST request; `sent` is called once it has gone out."""

    status: HTTPStatus
    kind: str
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    sent: Callable[[], None] = lambda: None


class Owner:
    """Whom a server works for; this one takes no POST request and holds nothing for a connection."""

    def most_posted(self, path: str, headers: Mapping[str, str]) -> int:
        """Bytes that the body of a POST request may have, before any is read; -1 refuses it."""
        return -1

    def post(self, path: str, headers: Mapping[str, str], body: bytes, alive: Callable[[], bool]) -> Answer:
        """Answer a POST request, of names of headers in lower case; `alive` tells whether its sender still waits."""
        raise NotImplementedError

    def forget(self) -> None:
        """Called in a connection's thread when the connection ends."""


def tls(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """TLS 1.2 or later with this certificate.

    Raises:
        ArtifactError: certificate and key cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ArtifactError(f"{certificate} and {key} are no certificate with its key: {error}.") from error
    return context


def check_tls(certificate: Path, key: Path, ca: Path) -> None:
    """Check by a handshake in memory that a client which trusts `ca` takes the server's certificate.

    Raises:
        ArtifactError: a file cannot be used, has expired or does not belong to the others.
    """
    for file in (ca, certificate):
        check_certificate(read_small(file), file)
    asked, answered = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = tls(certificate, key).wrap_bio(asked, answered, server_side=True)
    client = ssl.create_default_context(cafile=ca).wrap_bio(answered, asked, server_hostname=_HERE)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", "") or error.reason
            raise ArtifactError(
                f"{certificate} is no certificate for {_HERE} that {ca} vouches for ({why}). Restore both from a copy, "
                "or make a new folder with `fedproxy keys init`."
            ) from error


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread a connection, so many at most; a connection that lets its deadline pass is shut."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, owner: Owner, address: tuple[str, int], context: ssl.SSLContext | None, handler: type["Handler"]
    ) -> None:
        self.owner: Any = owner
        self._context = context
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        self._places = Places(CONNECTIONS_EACH)
        self.strangers = Allowance(STRANGERS_AT_ONCE, STRANGERS_A_SECOND)
        self._deadlines: dict[socket.socket, float] = {}
        self._closing = False
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a connection's thread, unless there are too many."""
        address = neighbourhood(client_address[0])
        if not self._places.enter(address):
            self.shutdown_request(request)
            return
        if not self._slots.acquire(blocking=False):
            self._places.leave(address)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._slots.release()
            self._places.leave(address)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """A connection, its TLS handshake included."""
        try:
            if self._context is not None:
                request = self._context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
                self.allow(request, HANDSHAKE_SECONDS)
                request.do_handshake()
            self.finish_request(request, client_address)
        except OSError as error:
            log.debug("%s: %s", client_address, error)
        except Exception as error:  # whatever it is, it ends this connection and nothing else
            log.warning(
                "A request from %s failed: %s: %s", client_address[0], type(error).__name__, plain(str(error), 200)
            )
        finally:
            self.owner.forget()
            self._deadlines.pop(request, None)
            self.shutdown_request(request)
            self._slots.release()
            self._places.leave(neighbourhood(client_address[0]))

    def allow(self, connection: socket.socket, seconds: float) -> None:
        """Give a connection so much time from now; none once the server closes."""
        self._deadlines[connection] = time.monotonic() + seconds
        if self._closing:
            _shut(connection)

    def service_actions(self) -> None:
        """Shut the connections whose time is over."""
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


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection; GET is a subclass's matter."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fedproxy", ""
    error_content_type, error_message_format = "text/plain", "%(message)s\n"
    disable_nagle_algorithm = True
    """Else the body of a short answer waits some 40 ms, until its head has been acknowledged."""
    server: Server

    def handle_one_request(self) -> None:
        """Wait for a request and answer it."""
        self.server.allow(self.connection, REQUEST_SECONDS)
        super().handle_one_request()

    def do_POST(self) -> None:
        """Read no more of a body than its sender may send, and let the owner answer."""
        self.server.allow(self.connection, PIECE_SECONDS)
        owner: Owner = self.server.owner
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = headers.get("content-length", "")
        try:
            most = owner.most_posted(self.path, headers)
            if most < 0 or "transfer-encoding" in headers or not _LENGTH.fullmatch(length) or int(length) > most:
                self.close_connection = True
                refused = HTTPStatus.UNAUTHORIZED if most < 0 else HTTPStatus.REQUEST_ENTITY_TOO_LARGE
                self.hold_back(refused)
                self.send_error(refused, "not for this client" if most < 0 else f"a body has {most} bytes at most")
                return
            body = bytearray()
            while len(body) < int(length):
                self.server.allow(self.connection, PIECE_SECONDS)
                piece = self.rfile.read(min(PIECE_BYTES, int(length) - len(body)))
                if not piece:
                    self.close_connection = True
                    return
                body += piece
            self.server.allow(self.connection, 2 * PIECE_SECONDS)
            answer = owner.post(self.path, headers, bytes(body), self._is_awaited)
            self.server.allow(self.connection, 2 * PIECE_SECONDS)
        except FedproxyError as error:
            log.warning("%s cannot be answered: %s", self.path[:80], error)
            self.close_connection = True
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "try again")
            return
        self.hold_back(answer.status)
        self.send_response(answer.status)
        said = {"Content-Type": answer.kind, "Content-Length": str(len(answer.content)), **answer.headers}
        for header, value in said.items():
            self.send_header(header, value)
        self.end_headers()
        for begin in range(0, len(answer.content), PIECE_BYTES):
            self.server.allow(self.connection, PIECE_SECONDS)
            self.wfile.write(answer.content[begin : begin + PIECE_BYTES])
        answer.sent()

    def hold_back(self, status: HTTPStatus) -> None:
        """Let an address that is refused again and again wait for its answers."""
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            delay = self.server.strangers.take(neighbourhood(self.client_address[0]))
            time.sleep(min(delay, LONGEST_DELAY))

    def _is_awaited(self) -> bool:
        """Whether the client still waits for its answer: who says something meanwhile, or nothing more, does not."""
        return not select.select([self.connection], [], [], 0)[0]

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are of interest for debugging only."""
        log.debug(format, *arguments)
