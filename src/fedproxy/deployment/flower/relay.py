"""The way of a SuperNode to its server: through the process that started it, which notes what leaves.

Flower's SuperNode connects to this relay on loopback, in plaintext, and to nothing else. The relay connects to the
server as `Link` does: over TLS that trusts the owner's authority alone, and through the network's proxy.
"""

import contextlib
import http.client
import logging
import select
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable

from fedproxy.deployment.flower.requests import FLEET, signer
from fedproxy.deployment.handout.link import SILENCE_SECONDS, BrokenLinkError, Link, OnRequest
from fedproxy.errors import FedproxyError

log = logging.getLogger(__name__)

_PIECE_BYTES = 64 << 10


class Relay:
    """Passes on the requests of one SuperNode, from `start` to `close`.

    Args:
        link: Makes the way to the server, given who is told of each request before it leaves.
        on_request: Told of each; what it raises keeps the request here.
        key: The SuperNode's public key (PEM): nothing passes that it did not sign. None where no key tells who it is.
    """

    def __init__(self, link: Callable[[OnRequest], Link], on_request: OnRequest, key: str | None) -> None:
        self._on_request, self._key = on_request, key
        self._link = link(self._checked)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.link = self._link
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="relay", daemon=True)

    @property
    def port(self) -> int:
        """The port of loopback that it listens at."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Begin to pass on."""
        self._thread.start()

    def close(self) -> None:
        """Break off what is being passed on, and close the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.close_connections()
        self._server.server_close()

    def _checked(self, request: bytes) -> None:
        line, _, rest = request.partition(b"\r\n\r\n")[0].partition(b"\r\n")
        method, path, _ = line.decode("latin-1").split(" ", 2)
        if method == "CONNECT":  # to the network's proxy, by the link itself
            self._on_request(request)
            return
        pairs = (header.partition(":") for header in rest.decode("latin-1").split("\r\n"))
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if method != "POST" or not path.startswith(FLEET):
            raise ConnectionError(f"a SuperNode does not ask for {path:.80}")
        if self._key is not None and signer(headers) != self._key:
            raise ConnectionError("another than the SuperNode signed it")
        self._on_request(request)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    link: Link

    def __init__(self, address: tuple[str, int], handler: type["_Handler"]) -> None:
        super().__init__(address, handler)
        self._open: set[socket.socket] = set()

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        """Begin a connection's thread."""
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        """Called when a connection's thread ends."""
        self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Shut every connection."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        """One connection, until either side closes it; the SuperNode opens another when it needs one."""
        try:
            with contextlib.closing(self.server.link.open()) as door:
                _pass_on(self.request, door)
        except (OSError, ValueError, BrokenLinkError, FedproxyError) as error:
            log.debug("A connection of the SuperNode ended: %s", error)


def _pass_on(node: socket.socket, door: http.client.HTTPConnection) -> None:
    server = door.sock
    while True:
        found = select.select([node, server], [], [])[0]
        if node in found:
            said = node.recv(_PIECE_BYTES)
            if not said:
                return
            server.settimeout(SILENCE_SECONDS)
            door.send(said)
        server.settimeout(0.0)  # of TLS there may be records to read that hold nothing for the SuperNode
        with contextlib.suppress(ssl.SSLWantReadError, BlockingIOError):
            while answer := server.recv(_PIECE_BYTES):
                node.sendall(answer)
            return
