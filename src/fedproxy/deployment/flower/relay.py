"""The way of a SuperNode to its server: through the process that started it, which notes what leaves.

Flower's SuperNode connects to this relay on loopback and to nothing else; over TLS, since without it no SuperNode shows
its key, with a certificate that lives as long as the relay. The relay connects to the server as `Link` does: over TLS
that trusts the owner's authority alone, and through the network's proxy.
"""

import contextlib
import http.client
import logging
import select
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedproxy.artifacts import write_secret
from fedproxy.deployment.certificates import certificate_pem, make_ca, make_key, make_server_certificate, private_pem
from fedproxy.deployment.flower.requests import FLEET, signer
from fedproxy.deployment.handout.https import tls
from fedproxy.deployment.handout.link import SILENCE_SECONDS, BrokenLinkError, Link, OnRequest
from fedproxy.errors import FedproxyError

log = logging.getLogger(__name__)

_HERE = "127.0.0.1"
_CERTIFICATE, _KEY = "relay.crt", "relay.key"
_PIECE_BYTES = 64 << 10


class Relay:
    """Passes on the requests of one SuperNode, from `start` to `close`.

    Args:
        folder: Where its certificate and key are put, if it has any.
        link: The way to the server.
        on_request: Told each request before it leaves; what it raises keeps the request here.
        key: The SuperNode's public key (PEM): nothing passes that it did not sign. None for plaintext, where no key
            tells who it is.

    Attributes:
        ca: The certificate (PEM) by which the SuperNode knows the relay; none for plaintext.
    """

    def __init__(self, folder: Path, link: Link, on_request: OnRequest, key: str | None) -> None:
        self._on_request, self._key = on_request, key
        self.ca = None if key is None else _certify(folder)
        context = None if key is None else tls(folder / _CERTIFICATE, folder / _KEY)
        self._server = _Server(lambda: link.open(self._checked), context)
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
        pairs = (header.partition(":") for header in rest.decode("latin-1").split("\r\n"))
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if method != "POST" or not path.startswith(FLEET):
            raise ConnectionError(f"a SuperNode does not ask for {path:.80}")
        if self._key is not None and signer(headers) != self._key:
            raise ConnectionError("another than the SuperNode signed it")
        self._on_request(request)


def _certify(folder: Path) -> bytes:
    """Write a certificate for this machine and its key; gives that of the authority that signed it, and no other."""
    key, ca_key = make_key(), make_key()
    ca = make_ca(ca_key)
    certificate = make_server_certificate(key, ca, ca_key, [_HERE])
    write_secret(folder / _KEY, private_pem(key))
    write_secret(folder / _CERTIFICATE, certificate_pem(certificate))
    return certificate_pem(ca)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, door: Callable[[], http.client.HTTPConnection], context: ssl.SSLContext | None) -> None:
        super().__init__((_HERE, 0), socketserver.BaseRequestHandler)
        self._door, self._context = door, context
        self._open: set[socket.socket] = set()

    def finish_request(self, request: Any, client_address: object) -> None:
        """One connection, until either side closes it; the SuperNode opens another when it needs one."""
        node = request
        try:
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                node = self._context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
            self._open.add(node)
            node.settimeout(SILENCE_SECONDS)
            if self._context is not None:
                node.do_handshake()
            with node, contextlib.closing(self._door()) as door:
                _pass_on(node, door)
        except (OSError, ValueError, BrokenLinkError, FedproxyError) as error:
            log.debug("A connection of the SuperNode ended: %s", error)
        finally:
            self._open.discard(node)

    def close_connections(self) -> None:
        """Shut every connection."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                # Not SSLSocket's own method, which pulls the TLS state from under the thread that uses it.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _pass_on(node: socket.socket, door: http.client.HTTPConnection) -> None:
    while True:
        select.select([node, door.sock], [], [])
        for piece in _pieces(node):
            if not piece:
                return
            door.send(piece)
        for piece in _pieces(door.sock):
            if not piece:
                return
            node.sendall(piece)


def _pieces(source: socket.socket) -> Iterator[bytes]:
    """What there is to be read now; at last an empty piece, once the other side has closed."""
    source.settimeout(0.0)
    try:
        while piece := source.recv(_PIECE_BYTES):
            yield piece
        yield b""
    except (ssl.SSLWantReadError, BlockingIOError):  # records of TLS may hold nothing for us
        return
    finally:
        source.settimeout(SILENCE_SECONDS)
