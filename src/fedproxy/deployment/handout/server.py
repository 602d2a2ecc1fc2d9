"""Hands out a proxy over HTTPS: parts by their hash to those who hold a token, never a file by its path."""

import contextlib
import hmac
import logging
import os
import re
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path

from fedproxy.deployment.handout.https import PIECE_SECONDS, Handler, Owner, Server, tls
from fedproxy.deployment.handout.parts import BUFFER_BYTES, PART_BYTES, Listing, list_parts, opened
from fedproxy.deployment.limits import Allowance
from fedproxy.errors import ArtifactError, FedproxyError, UsageError

log = logging.getLogger(__name__)

RESULT = "/result"
"""Where the listing is of what a federation ended with, beside "/listing", that of the proxy."""
TIMES_AT_ONCE, SECONDS_A_TIME = 8, 600.0
"""A client gets the proxy so often at once, and once more in so many seconds."""
_PART = re.compile(r"/parts/([0-9a-f]{64})")
_RANGE = re.compile(r"bytes=([0-9]{1,19})-")


class HandoutServer(Owner):
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
        self.bytes = Allowance(TIMES_AT_ONCE * listing.size, listing.size / SECONDS_A_TIME)
        self.sent: Counter[str] = Counter()
        """Bytes of parts sent, by client."""
        self._tokens: dict[str, str] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        context = None if certificate is None else tls(certificate, key)
        with contextlib.ExitStack() as stack:
            handles = stack.enter_context(opened(proxy))
            sizes = {name: os.fstat(handle).st_size for name, handle in handles.items()}
            if sizes != {file.name: file.size for file in listing.files}:
                raise ArtifactError(f"{proxy} was changed since its parts were listed. Start again.")
            self.listings = {"/listing": listing}
            self.places = _places(listing, handles)
            try:
                self._server = Server(self, (host, port), context, _Handler)
            except OSError as error:
                raise UsageError(f"cannot listen at {host}:{port} ({error.strerror or error}).") from error
            stack.callback(self._server.server_close)
            self._open = stack.pop_all()

    def share(self, file: Path, part_bytes: int = PART_BYTES) -> Listing:
        """Hand out a file beside the proxy from now on: what a federation ended with.

        Raises:
            ArtifactError: it cannot be read.
        """
        try:
            handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ArtifactError(f"{file} cannot be handed out: {error.strerror}.") from error
        self._open.callback(os.close, handle)
        handles = {file.name: handle}
        listing = list_parts(handles, part_bytes)
        self.places |= _places(listing, handles)
        self.listings[RESULT] = listing
        return listing

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


def _places(listing: Listing, handles: Mapping[str, int]) -> dict[str, tuple[int, int, int]]:
    """Where each part lies: SHA-256 → handle, offset, length."""
    return {
        part.sha256: (handles[file.name], part.offset, part.length) for file in listing.files for part in file.parts
    }


class _Handler(Handler):
    def do_GET(self) -> None:  # noqa: N802
        owner: HandoutServer = self.server.owner
        self.server.allow(self.connection, PIECE_SECONDS)
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            self.send_error(HTTPStatus.BAD_REQUEST, "a request has no body")
            return
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        name = owner.holder(token) if kind == "Bearer" else None
        if name is None:
            self.hold_back(HTTPStatus.UNAUTHORIZED)
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
        elif (listing := owner.listings.get(self.path)) is not None:
            self._head(HTTPStatus.OK, len(listing.content))
            self.wfile.write(listing.content)
        elif (part := _PART.fullmatch(self.path)) and part[1] in owner.places:
            _, _, length = owner.places[part[1]]
            if owner.bytes.take(name, length):
                self.send_error(HTTPStatus.TOO_MANY_REQUESTS, "this client had the proxy often enough, try again later")
            else:
                self._send_part(name, *owner.places[part[1]])
        else:
            self.send_error(HTTPStatus.NOT_FOUND, "no such part")

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
