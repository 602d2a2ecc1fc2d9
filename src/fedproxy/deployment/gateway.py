"""The one port that clients see: welcome, hand-out of the proxy, and the way to Flower's Fleet API.

Flower's SuperLink serves its Control API on the same port as the Fleet API. So the SuperLink listens on loopback only,
and this gateway lets clients through to the Fleet API and to nothing else: those whose registered key signed the
request, checked before any of its body is read. `flower/fleet.py` holds each to its own orders and answers. A revoked
key is refused from the next request on.
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
from typing import TYPE_CHECKING

from fedproxy.deployment import welcome
from fedproxy.deployment.audit import Audit
from fedproxy.deployment.certificates import fingerprint_of_pem
from fedproxy.deployment.flower.requests import FLEET, RefusedError, Said, named, signer
from fedproxy.deployment.handout.https import Answer
from fedproxy.deployment.handout.parts import Listing
from fedproxy.deployment.handout.server import HandoutServer
from fedproxy.deployment.members import Member, Members
from fedproxy.federation.offer import Offer
from fedproxy.federation.protocol import PROTOCOL, version
from fedproxy.foreign import plain

if TYPE_CHECKING:
    from fedproxy.deployment.flower.fleet import Fleet

log = logging.getLogger(__name__)

MOST_BYTES = 16 << 20
"""The largest body that is passed on; Flower cuts what it sends into pieces of 5 MiB."""
_SELF_REGISTRATION = frozenset(("register-node", "unregister-node"))
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
        fleet: What each client may ask of it.
        audit: Where it is noted who came, and who was refused.
        verdict: Tells what became of a client's last answer.
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
        fleet: "Fleet",
        audit: Audit,
        verdict: Callable[[str], welcome.Verdict | None],
    ) -> None:
        super().__init__(proxy, listing, host, port, certificate, key, members.holds)
        self._members, self._offer, self._upstream, self._fleet = members, offer, upstream, fleet
        self._audit, self._verdict = audit, verdict
        self._local = threading.local()
        self._ended: str | None = None
        self._result = ""
        self._told: set[str] = set()
        self._asked: dict[str, float] = {}
        self._lock = threading.Lock()
        self._processes: dict[str, collections.deque[str]] = {}

    def end(self, how: str, result: Path | None = None) -> int:
        """From now on tell every client that asks that the federation is over.

        Args:
            how: "complete", or "failed".
            result: The file that clients get of it; then a client counts as told once it says that it has all.

        Returns:
            Bytes of the result.

        Raises:
            ArtifactError: the result cannot be read.
        """
        listing = None if result is None else self.share(result)
        self._ended, self._result = how, "" if listing is None else listing.sha256
        return 0 if listing is None else listing.size

    def untold(self, seconds: float) -> frozenset[str]:
        """The clients that asked or fetched something within so many seconds, and that are not done with it all yet."""
        since = time.monotonic() - seconds
        return frozenset(name for name, asked in list(self._asked.items()) if asked >= since) - self._told

    def most_posted(self, path: str, headers: Mapping[str, str]) -> int:
        """Bytes that the body of a request may have: many only from members."""
        if path in (welcome.PATH, welcome.FAREWELL):
            return welcome.MOST_BYTES
        if path.startswith(FLEET):
            with contextlib.suppress(ValueError):
                if self._member(signer(headers), headers) is not None:
                    return MOST_BYTES
        self._audit.note("unauthenticated", path=path)
        return -1

    def post(self, path: str, headers: Mapping[str, str], body: bytes, alive: Callable[[], bool]) -> Answer:
        """Answer a request."""
        if path in (welcome.PATH, welcome.FAREWELL):
            return self._welcome(body, leaves=path == welcome.FAREWELL)
        name, key = path.removeprefix(FLEET), named(headers)  # which signed it: see most_posted
        if (member := self._member(key, headers)) is None:  # it was revoked this moment
            self._audit.note("unauthenticated", path=path)
            return _said(HTTPStatus.UNAUTHORIZED, "not for this client")
        passed = {header: value for header, value in headers.items() if _PASSED.fullmatch(header)}
        try:
            if name in _SELF_REGISTRATION and self._members.registered:
                raise RefusedError("clients have no use for it")
            said = self._fleet.handle(key, name, body, lambda what, content: self._ask(what, content, passed), alive)
        except RefusedError as error:
            log.warning("%s: %s is refused: %s", member, plain(name, 40), error)
            self._audit.note("refused", member, request=name, reason=str(error))
            return _said(HTTPStatus.FORBIDDEN, str(error))
        if name == "register-node" and said.status == HTTPStatus.OK:
            before = self._members.seat(member, key)
            if before not in (None, key):
                self._fleet.leave(before)
        kind = said.headers.get("Content-Type", "application/protobuf")
        return Answer(HTTPStatus(said.status), kind, said.content, _of_flower(said.headers))

    def _member(self, key: str, headers: Mapping[str, str]) -> str | None:
        """The member whose key this is; without a register, a token names it."""
        if self._members.registered:
            member = self._members.find(key)
            return None if member is None else member.name
        try:
            token = base64.b64decode(headers.get("authorization", "").removeprefix("Basic "), validate=True).decode()
        except ValueError:
            return None
        holder = self.holder(token.partition(":")[2])
        return None if holder is None or not self._members.holds(holder) else holder.partition(" ")[0]

    def _welcome(self, body: bytes, *, leaves: bool) -> Answer:
        try:
            said = welcome.check_introduction(body)
        except welcome.StrangerError as error:
            self._audit.note("refused", reason=str(error))
            return _said(HTTPStatus.FORBIDDEN, str(error))
        try:
            member = self._members.enter(said.public_key, said.name, stay=bool(said.process))
        except welcome.StrangerError as error:
            self._audit.note("refused", key=fingerprint_of_pem(said.public_key), reason=str(error))
            return _said(HTTPStatus.FORBIDDEN, str(error))
        if said.process and not self._is_newest(member, said.process):
            reason = f'another process joined as "{member.name}" after this one.'
            self._audit.note("refused", member.name, reason=reason)
            return _said(HTTPStatus.FORBIDDEN, reason)
        verdict = self._verdict(member.name)
        if self._ended is not None and (leaves or not self._result):
            gone = _said(HTTPStatus.GONE, self._ended, verdict=verdict and vars(verdict))
            return replace(gone, sent=lambda: self._told.add(member.name))
        if said.process:
            self._asked[member.name] = time.monotonic()
        offer = self._offer(member.name, said.spoken)
        answer = welcome.Welcome(member.name, self.issue(member.identity), offer, verdict, self._result)
        return Answer(HTTPStatus.OK, "application/json", answer.encode())

    def _is_newest(self, member: Member, process: str) -> bool:
        """Whether no other process introduced itself as this client after the first time that this one did."""
        with self._lock:
            processes = self._processes.setdefault(member.name, collections.deque(maxlen=_PROCESSES))
            if process not in processes:
                processes.append(process)
                self._audit.note("joined", member.name, key=member.fingerprint)
            return processes[-1] == process

    def count_sent(self, name: str, count: int) -> None:
        """Add to `sent`, and note when a client has had as much as the whole proxy."""
        member = name.partition(" ")[0]
        if self._result:
            self._asked[member] = time.monotonic()
        before = self.sent[name] // self.listing.size
        super().count_sent(name, count)
        if self.sent[name] // self.listing.size > before:
            self._audit.note("handed out", member, bytes=self.sent[name])

    def _ask(self, name: str, body: bytes, headers: Mapping[str, str]) -> Said:
        for last in (False, True):
            connection = self._connection()
            try:
                connection.request("POST", FLEET + name, body, headers)
                answer = connection.getresponse()
                return Said(answer.status, answer.read(), dict(answer.getheaders()))
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if last:
                    log.debug("the SuperLink does not answer: %s", error)
        return Said(HTTPStatus.BAD_GATEWAY, b"")

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


def _of_flower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower().startswith("flwr-")}


def _said(status: HTTPStatus, reason: str, **more: object) -> Answer:
    said = {"reason": reason, "protocol": PROTOCOL, "version": version(), **more}
    return Answer(status, "application/json", json.dumps(said).encode())
