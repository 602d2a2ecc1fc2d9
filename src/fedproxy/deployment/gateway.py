"""The one port that clients see: welcome, hand-out of the proxy, and the way to Flower's Fleet API.

Flower's SuperLink serves its Control API, with which anyone who reaches it may start code, on the same port as the
Fleet API. So the SuperLink listens on loopback only, and this gateway lets clients with a registered key through to the
Fleet API and to nothing else. A revoked key is refused from the next request on.
"""

import base64
import collections
import contextlib
import http.client
import json
import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path

from fedproxy.deployment import welcome
from fedproxy.deployment.handout.https import Answer
from fedproxy.deployment.handout.parts import Listing
from fedproxy.deployment.handout.server import HandoutServer
from fedproxy.deployment.members import Members
from fedproxy.federation.offer import Offer
from fedproxy.federation.protocol import PROTOCOL, version

log = logging.getLogger(__name__)

FLEET = "/v1/fleet/"
MOST_BYTES = 16 << 20
"""The largest body that is passed on; Flower cuts what it sends into pieces of 5 MiB."""
_FORWARDED = frozenset(
    {"activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run", "get-fab"}
    | {"push-object", "pull-object", "confirm-message-received"}
)
_SELF_REGISTRATION = frozenset(("register-node", "unregister-node"))
_KEY_HEADER = "flwr-public-key"
_PASSED = re.compile(r"flwr-[a-z0-9-]+|content-type|accept|user-agent", re.IGNORECASE)
_SUPERLINK_SECONDS = 60.0
_PROCESSES = 100
"""Of each client so many processes are known, to tell the older ones that they are."""


@dataclass(frozen=True)
class Upstream:
    """Where the SuperLink listens: a port of loopback, and the CA of its certificate (none for plaintext)."""

    port: int
    ca: Path | None


class Gateway(HandoutServer):
    """Lets clients in by their keys.

    Args:
        proxy: As of `HandoutServer`; and so are the others up to `key`.
        members: Who may take part.
        offer: Makes the offer for a client's name and the encodings that it agrees to.
        upstream: The SuperLink.
        pause: Seconds that clients wait between two questions for messages.
    """

    def __init__(
        self,
        proxy: Path,
        listing: Listing,
        host: str,
        port: int,
        certificate: Path | None,
        key: Path | None,
        *,
        members: Members,
        offer: Callable[[str, frozenset[str]], Offer],
        upstream: Upstream,
        pause: float,
    ) -> None:
        super().__init__(proxy, listing, host, port, certificate, key, members.holds)
        self._members, self._offer, self._upstream, self._pause = members, offer, upstream, pause
        self._local = threading.local()
        self._ended: str | None = None
        self._told: set[str] = set()
        self._asked: dict[str, float] = {}
        self._lock = threading.Lock()
        self._processes: dict[str, collections.deque[str]] = {}

    def end(self, how: str) -> None:
        """From now on tell every client that asks that the federation is over.

        Args:
            how: "complete", or "failed".
        """
        self._ended = how

    def untold(self, seconds: float) -> frozenset[str]:
        """The clients that have asked within so many seconds and were not told yet that the federation is over."""
        since = time.monotonic() - seconds
        return frozenset(name for name, asked in list(self._asked.items()) if asked >= since) - self._told

    def most_posted(self, path: str, headers: Mapping[str, str]) -> int:
        """Bytes that the body of a request may have: many only from those who name a member's key."""
        if path == welcome.PATH:
            return welcome.MOST_BYTES
        return MOST_BYTES if path.startswith(FLEET) and self._is_member(headers) else -1

    def post(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Answer a request."""
        if path == welcome.PATH:
            return self._welcome(body)
        return self._forward(path.removeprefix(FLEET), headers, body)

    def _is_member(self, headers: Mapping[str, str]) -> bool:
        """Whether the key that a request names is a member's; the SuperLink checks that it also signed it."""
        try:
            return self._members.knows(base64.b64decode(headers.get(_KEY_HEADER, ""), validate=True).decode())
        except ValueError:
            return False

    def _welcome(self, body: bytes) -> Answer:
        try:
            said = welcome.check_introduction(body)
            member = self._members.enter(said.public_key, said.name)
        except welcome.StrangerError as error:
            return _said(HTTPStatus.FORBIDDEN, str(error))
        if not self._is_newest(member.name, said.process):
            return _said(HTTPStatus.FORBIDDEN, f'another process joined as "{member.name}" after this one.')
        if self._ended is not None:
            return replace(_said(HTTPStatus.GONE, self._ended), sent=lambda: self._told.add(member.name))
        self._asked[member.name] = time.monotonic()
        offer = self._offer(member.name, said.spoken)
        answer = welcome.Welcome(member.name, self.issue(member.identity), self._pause, offer)
        return Answer(HTTPStatus.OK, "application/json", answer.encode())

    def _is_newest(self, name: str, process: str) -> bool:
        """Whether no other process introduced itself as this client after the first time that this one did."""
        with self._lock:
            processes = self._processes.setdefault(name, collections.deque(maxlen=_PROCESSES))
            if process not in processes:
                processes.append(process)
            return processes[-1] == process

    def _forward(self, name: str, headers: Mapping[str, str], body: bytes) -> Answer:
        allowed = _FORWARDED if self._members.registered else _FORWARDED | _SELF_REGISTRATION
        if name not in allowed:
            return _said(HTTPStatus.NOT_FOUND, "clients have no use for it")
        passed = {header: value for header, value in headers.items() if _PASSED.fullmatch(header)}
        for last in (False, True):
            connection = self._connection()
            try:
                connection.request("POST", FLEET + name, body, passed)
                answer = connection.getresponse()
                content = answer.read()
                kind = answer.getheader("Content-Type", "application/octet-stream")
                extra = {header: value for header, value in answer.getheaders() if header.lower().startswith("flwr-")}
                return Answer(HTTPStatus(answer.status), kind, content, extra)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if last:
                    log.debug("the SuperLink does not answer: %s", error)
        return _said(HTTPStatus.BAD_GATEWAY, "the SuperLink does not answer, try again")

    def _connection(self) -> http.client.HTTPConnection:
        """This thread's connection to the SuperLink; a thread serves one client's connection."""
        if not hasattr(self._local, "connection"):
            where, wait = ("127.0.0.1", self._upstream.port), _SUPERLINK_SECONDS
            if self._upstream.ca is None:
                self._local.connection = http.client.HTTPConnection(*where, timeout=wait)
            else:
                trusted = ssl.create_default_context(cafile=self._upstream.ca)
                self._local.connection = http.client.HTTPSConnection(*where, timeout=wait, context=trusted)
        return self._local.connection  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Close what the ending thread holds open."""
        with contextlib.suppress(AttributeError):
            self._local.connection.close()


def _said(status: HTTPStatus, reason: str) -> Answer:
    said = {"reason": reason, "protocol": PROTOCOL, "version": version()}
    return Answer(status, "application/json", json.dumps(said).encode())
