"""Networks: one whose only way out is a proxy, at a rate of its own; and one that is tapped with the server's key."""

import contextlib
import select
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fedproxy.deployment.handout.https import tls

PIECE = 1200


class _Relay(socketserver.StreamRequestHandler):
    server: "Proxy"

    def handle(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n") and (line := self.rfile.readline(4096)):
            head += line
        target = head.split()[1].decode() if head.startswith(b"CONNECT ") else ""
        self.server.seen.append(target)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(target.split(":")[1]))) as out:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=self._pump, args=(out, self.connection), daemon=True)
            back.start()
            self._pump(self.connection, out)
            back.join(10)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(PIECE):
                target.sendall(content)
                time.sleep(len(content) / self.server.rate)
            target.shutdown(socket.SHUT_WR)


class Proxy(socketserver.ThreadingTCPServer):
    """Leads every name to 127.0.0.1; `seen` holds what was asked for.

    Args:
        rate: Bytes a second that a connection gets in each direction.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, rate: float) -> None:
        super().__init__(("127.0.0.1", 0), _Relay)
        self.rate, self.seen = rate, list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def proxy(rate: float = 1e9) -> Iterator[Proxy]:
    """A proxy that runs."""
    with Proxy(rate) as one:
        threading.Thread(target=one.serve_forever, args=(0.05,), daemon=True).start()
        yield one
        one.shutdown()


class Tap(socketserver.ThreadingTCPServer):
    """Stands before a server as if it were that, with its key, and keeps all that clients say within TLS.

    Args:
        keys: The server's folder of keys.
        port: Where the server listens on loopback.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, keys: Path, port: int) -> None:
        super().__init__(("127.0.0.1", 0), None)  # type: ignore[arg-type]
        self._context, self._port = tls(keys / "server.crt", keys / "server.key"), port
        self._trusted = ssl.create_default_context(cafile=keys / "ca.crt")
        self.streams: list[bytearray] = []
        """What came over each connection."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def finish_request(self, request: object, client_address: object) -> None:
        seen = bytearray()
        self.streams.append(seen)
        with (
            contextlib.suppress(OSError),
            self._context.wrap_socket(request, server_side=True) as client,  # type: ignore[arg-type]
            socket.create_connection(("127.0.0.1", self._port)) as out,
            self._trusted.wrap_socket(out, server_hostname="127.0.0.1") as server,
        ):
            ways = {client: server, server: client}
            while client in ways:  # also when the server has nothing more to say
                for source in select.select(list(ways), [], [])[0]:
                    source.settimeout(0.0)
                    try:
                        content = source.recv(1 << 16)
                        while content and source.pending():
                            content += source.recv(1 << 16)
                    except ssl.SSLWantReadError:
                        continue
                    finally:
                        source.settimeout(60.0)
                    if source is client:
                        seen += content
                    if not content:
                        target = ways.pop(source)
                        with contextlib.suppress(OSError):
                            socket.socket.shutdown(target, socket.SHUT_WR)
                        continue
                    with contextlib.suppress(OSError):
                        ways[source].sendall(content)


@contextlib.contextmanager
def tap(keys: Path, address: str) -> Iterator[Tap]:
    """A tap that runs."""
    with Tap(keys, int(address.rpartition(":")[2])) as one:
        threading.Thread(target=one.serve_forever, args=(0.05,), daemon=True).start()
        yield one
        one.shutdown()
