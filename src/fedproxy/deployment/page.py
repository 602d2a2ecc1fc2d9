"""One page over HTTP, for whoever may watch a run: read only, without a key, from memory."""

import ipaddress
import re
import threading
import time
from collections.abc import Callable
from http import HTTPStatus

from fedproxy.deployment.address import LOOPBACK, Address
from fedproxy.deployment.handout.https import PIECE_BYTES, PIECE_SECONDS, Handler, Owner, Server
from fedproxy.errors import UsageError

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer, beside the page's own policy."""
NOTHING = "default-src 'none'"
_POLICY = re.compile(rb'<meta http-equiv="Content-Security-Policy" content="([^"\r\n]*)">')
LAST_LOOK_SECONDS = 4.0
"""How long a watcher has to see how it ended."""


class PageServer(Owner):
    """Serves one page at "/", to GET and HEAD, and nothing else.

    A request must name the host by its address, as "localhost" or as given here, so that no page from elsewhere can
    read this one under a name of its own (DNS rebinding).

    Args:
        address: Where to listen.
        content: Gives the page as it is now.

    Raises:
        UsageError: one cannot listen there.
    """

    def __init__(self, address: Address, content: Callable[[], bytes]) -> None:
        self.content, self.host = content, address.host
        self.asked = self.seen = 0.0
        """When the last look began, and when the last one began that has been answered."""
        try:
            self._server = Server(self, (address.host, address.port), None, _Handler)
        except OSError as error:
            raise UsageError(f"cannot listen at {address} ({error.strerror or error}).") from error
        self.address = Address(address.host, int(self._server.server_address[1]))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, once whoever looked lately could look once more."""
        began = time.monotonic()
        watched = began - self.asked < LAST_LOOK_SECONDS
        while watched and self.seen < began and time.monotonic() < began + LAST_LOOK_SECONDS:
            time.sleep(0.1)
        self._server.shutdown()
        self._thread.join()
        self._server.close_connections()
        self._server.server_close()


class _Handler(Handler):
    _policy = NOTHING

    def do_GET(self) -> None:  # noqa: N802
        owner: PageServer = self.server.owner
        came = time.monotonic()
        self.server.allow(self.connection, PIECE_SECONDS)
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            self.send_error(HTTPStatus.BAD_REQUEST, "a request has no body")
        elif not self._is_meant(owner.host):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "not this host")
        elif self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND, "there is one page, at /")
        else:
            owner.asked = came
            content = owner.content()
            if own := _POLICY.search(content):
                self._policy = own[1].decode("latin-1")
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            for begin in range(0, len(content), PIECE_BYTES):
                self.server.allow(self.connection, PIECE_SECONDS)
                self.wfile.write(content[begin : begin + PIECE_BYTES])
            owner.seen = came

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:  # noqa: N802
        """Refuse it, without reading what it brings."""
        self.close_connection = True
        self.send_error(HTTPStatus.METHOD_NOT_ALLOWED, "this page is for reading")

    def end_headers(self) -> None:
        """Send the headers that every answer has."""
        self.send_header("Content-Security-Policy", f"{self._policy}; frame-ancestors 'none'")
        self._policy = NOTHING
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def _is_meant(self, host: str) -> bool:
        asked = self.headers.get_all("Host") or []
        try:
            named = Address.parse(asked[0] if ":" in asked[0].rpartition("]")[2] else f"{asked[0]}:80").host
        except (IndexError, UsageError):
            return False
        return len(asked) == 1 and (named.lower() in (host.lower(), *LOOPBACK) or _is_number(named))


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
