"""A client's connection to the server: one request after the other, with errors that say what is wrong.

Nothing of a client leaves its machine but by `_Door.send`, which tells of each request before it goes out.
"""

import base64
import contextlib
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.client import BadStatusLine, HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from fedproxy.errors import ArtifactError, FederationError, UsageError

SILENCE_SECONDS = 60.0
"""After so long without a byte a connection counts as broken."""
_NO_TLS = ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,200}")
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_CLOSED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
_BLOCK_BYTES = 64 << 10
_HEAD_BYTES, REQUEST_BYTES = 64 << 10, 16 << 20
"""The largest head and body of a request; a gateway takes no more."""
_BODY = re.compile(rb"\r\ncontent-length: *([0-9]{1,15})\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)


class BrokenLinkError(Exception):
    """A connection broke, or the server is busy; the same request may succeed later."""


OnRequest = Callable[[bytes], None]
"""Told a request, head and body, before any of it leaves; what it raises keeps the request here."""


def whole_request(content: bytes | bytearray) -> int:
    """Bytes of the HTTP request that `content` begins with; 0 as long as it is not there whole.

    Raises:
        ConnectionError: it is none whose end can be known, or larger than a gateway takes.
    """
    end = content.find(b"\r\n\r\n") + 4
    if end < 4:
        if len(content) > _HEAD_BYTES:
            raise ConnectionError("the head of a request has no end")
        return 0
    head = bytes(content[:end])
    body = _BODY.search(head)
    length = 0 if body is None else int(body[1])
    if _CHUNKED.search(head) or length > REQUEST_BYTES:
        raise ConnectionError(f"a request has no length, or more than {REQUEST_BYTES} bytes")
    return end + length if len(content) >= end + length else 0


class _Door(HTTPConnection):
    """Sends whole requests, and tells of each before it leaves."""

    def __init__(self, *where: Any, on_request: OnRequest, **how: Any) -> None:
        super().__init__(*where, **how)
        self.on_request, self._held = on_request, bytearray()

    def connect(self) -> None:
        """Open the connection; what is left of a request that never was whole is forgotten."""
        self._held.clear()
        super().connect()

    def send(self, data: Any) -> None:
        """Hold `data` back until its request is whole; then tell of it, and send it a block at a time."""
        if self.sock is None:
            self.connect()
        self._held += data
        while length := whole_request(self._held):
            request = bytes(self._held[:length])
            del self._held[:length]
            self.on_request(request)
            for begin in range(0, length, _BLOCK_BYTES):  # each of which has its own time
                self.sock.sendall(request[begin : begin + _BLOCK_BYTES])


class _SecureDoor(_Door, HTTPSConnection):
    """The same, over TLS."""


class Link:
    """A connection that is opened when needed, kept alive between requests, and opened anew once broken.

    It goes through the proxy that the environment names for it (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY).
    """

    def __init__(
        self, url: str, token: str | None, ca: bytes | None, on_request: OnRequest = lambda request: None
    ) -> None:
        """Look at the arguments; nothing is sent.

        Args:
            url: "https://HOST:PORT", or "http://HOST:PORT" where plaintext is meant.
            token: What the server issued; none before it has.
            ca: The certificate (PEM) that the server's must be signed by; the machine's own authorities if none.
            on_request: Told each request before it leaves, also that to the environment's proxy.

        Raises:
            UsageError: url or token are impossible, or the environment names a proxy that cannot be used.
            FederationError: the server offers plaintext to a client that knows its CA.
            ArtifactError: the CA's certificate is damaged.
        """
        parts = urlsplit(url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if parts.scheme not in ("http", "https") or not host or not port or url != f"{parts.scheme}://{parts.netloc}":
            raise UsageError(f"{url!r} is no address of a hand-out: must be https://HOST:PORT.")
        if token is not None and not _TOKEN.fullmatch(token):
            raise UsageError("the token of the hand-out is damaged.")
        self.where = f"{host}:{port}"
        self._answer: HTTPResponse | None = None
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._prefix, self._through, self._aborted = "", "", False
        proxy = _proxy_of(parts.scheme, host, port)
        at, said = (host, port), {}
        if proxy is not None:
            at, said = (str(proxy.hostname), proxy.port or 80), _credentials(proxy)
            self._through = f" (through the proxy {at[0]}:{at[1]})"
        how: dict[str, Any] = {"timeout": SILENCE_SECONDS, "on_request": on_request}
        kind = _SecureDoor if parts.scheme == "https" else _Door
        if kind is _SecureDoor:
            how["context"] = _context(ca)
        elif ca is not None:
            raise FederationError(f"{url}: the server offers the proxy in plaintext, which is refused with a CA.")

        def made(*, tunnelled: bool) -> _Door:
            door = kind(*at, **how)
            if proxy is not None and tunnelled:
                door.set_tunnel(host, port, said)
            return door

        self._made = made
        self._connection = made(tunnelled=parts.scheme == "https")
        if proxy is not None and parts.scheme == "http":
            self._prefix = url
            self._headers |= said

    def open(self, on_request: OnRequest) -> HTTPConnection:
        """A connection of its own to the server, open, for one who speaks HTTP for himself.

        Its `send` takes the bytes of requests, whole or not, and `sock` gives those of answers.

        Args:
            on_request: Told each of these requests before it leaves.

        Raises:
            BrokenLinkError, FederationError: as of `broken`.
        """
        door = self._made(tunnelled=True)
        with self.broken():
            door.connect()
        door.on_request = on_request
        return door

    def _ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None) -> HTTPResponse:
        """Send a request and read the head of its answer, anew if the server had closed the kept connection."""
        kept = self._connection.sock is not None
        try:
            self._connection.request(method, self._prefix + path, body, headers)
            self._answer = self._connection.getresponse()
        except _CLOSED:
            self.close()
            if not kept or self._aborted:
                raise
            return self._ask(method, path, headers, body)
        return self._answer

    def get(self, path: str, begin: int = 0) -> HTTPResponse:
        """Ask for `path` from byte `begin` on, and check the answer's head.

        Returns:
            The answer; its body has the stated `length`.

        Raises:
            BrokenLinkError: the connection broke.
            FederationError: the server is not the right one, or refuses.
            ArtifactError: the server has no such part.
        """
        headers = {**self._headers, "Range": f"bytes={begin}-"} if begin else self._headers
        with self.broken():
            answer = self._ask("GET", path, headers)
        status, expected = answer.status, HTTPStatus.PARTIAL_CONTENT if begin else HTTPStatus.OK
        if status == expected and answer.length is not None:
            return answer
        self.close()
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise FederationError(
                f"{self.where} refuses to hand out the proxy ({status} {answer.reason}): this client's key "
                "was revoked, or the server was started anew. Join again, or ask its owner."
            )
        if status in _BUSY:
            raise BrokenLinkError(f"it is busy ({status})")
        if status == HTTPStatus.NOT_FOUND:
            raise ArtifactError(f"{self.where} has no {path}: it hands out another proxy now. Join again.")
        if 300 <= status < 400:
            raise FederationError(f"{self.where} redirects {path} elsewhere ({status}), which is not followed.")
        if status == expected:
            raise FederationError(f"{self.where} does not say how long {path} is. Is it a fedproxy server?")
        raise FederationError(f"{self.where} answers {path} with {status}, not {expected}. Is it a fedproxy server?")

    def post(self, path: str, body: bytes, most: int) -> tuple[int, bytes]:
        """Send `body` to `path`; twice, if the connection ends before an answer, so it must do no harm to repeat it.

        Args:
            path: Where to.
            body: What.
            most: Bytes of the answer that are read at most.

        Returns:
            Status and body of the answer.

        Raises:
            BrokenLinkError: the connection broke.
            FederationError: the server is not the right one.
            ArtifactError: the answer is too long.
        """
        with self.broken():
            answer = self._ask("POST", path, self._headers, body)
            content = answer.read(most + 1)
            if answer.length and len(content) <= most:  # http.client notices a short body only if all is asked for
                raise IncompleteRead(content, answer.length)
        if len(content) > most:
            self.close()
            raise ArtifactError(f"{self.where} answers {path} with more than {most} bytes. Is it a fedproxy server?")
        return answer.status, content

    @contextlib.contextmanager
    def broken(self) -> Iterator[None]:
        """On an error close the connection, and say what is wrong.

        Raises:
            BrokenLinkError: the connection broke.
            FederationError: it can be of no use, whatever is tried again.
        """
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise FederationError(
                f"{self.where} is not the server that the CA certificate vouches for ({error.verify_message}). "
                "Check address and CA certificate."
            ) from error
        except ssl.SSLError as error:
            self.close()
            if error.reason in _NO_TLS:
                raise FederationError(f"{self.where} does not speak TLS ({error.reason}).") from error
            raise BrokenLinkError(str(error)) from error
        except BadStatusLine as error:
            self.close()
            if str(error).startswith(("'\\x15", "\x15")):
                raise FederationError(f"{self.where} speaks TLS: use https://{self.where}.") from error
            raise BrokenLinkError(f"{type(error).__name__}: {str(error)[:80]}") from error
        except (OSError, HTTPException) as error:
            self.close()
            raise BrokenLinkError((str(error)[:200] or type(error).__name__) + self._through) from error

    def close(self) -> None:
        """Close the connection; the next request opens it anew."""
        self._connection.close()
        if self._answer is not None:
            self._answer.close()  # it holds the socket of a connection that the server will not keep
            self._answer = None

    def abort(self) -> None:
        """Wake up a thread that waits for this connection."""
        self._aborted = True
        connection = self._connection.sock
        if connection is not None:
            with contextlib.suppress(OSError):
                # Not SSLSocket's own method, which pulls the TLS state from under that thread.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _proxy_of(scheme: str, host: str, port: int) -> SplitResult | None:
    """The proxy that the environment names for such an address, None for none.

    Raises:
        UsageError: one that is named is no HTTP proxy; Flower's httpx fails on any such, whatever address is meant.
    """
    named = getproxies()
    found: dict[str, SplitResult] = {
        kind: _parsed(kind, named[kind]) for kind in ("http", "https", "all") if kind in named
    }
    return None if proxy_bypass(f"{host}:{port}") else found.get(scheme) or found.get("all")


def _parsed(kind: str, url: str) -> SplitResult:
    with contextlib.suppress(ValueError):
        proxy = urlsplit(url if "://" in url else f"http://{url}")
        if proxy.scheme == "http" and proxy.hostname and proxy.port != 0:
            return proxy
    what = f" of the kind {url.partition('://')[0]}://" if "://" in url else ""
    raise UsageError(
        f"{kind.upper()}_PROXY names a proxy{what} that cannot be used: it must be http://HOST:PORT. Set it to one, "
        "or unset it."
    )


def _credentials(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    told = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(told.encode()).decode()}"}


def _context(ca: bytes | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cadata=None if ca is None else ca.decode("ascii"))
    except (ValueError, ssl.SSLError) as error:
        raise ArtifactError("the CA certificate is damaged. Get a fresh copy from the owner.") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
