"""A network whose only way out is a proxy: CONNECT, to names that no name server knows, at a rate of its own."""

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

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
