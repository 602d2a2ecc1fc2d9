"""A client's ledger: everything that leaves its machine for the server, noted before any of it leaves.

A line is a request, or a mebibyte of one: when, what kind, where to, how many bytes, their SHA-256, and with `full` the
bytes themselves. They are those that go into the connection, which TLS then encrypts. Lines are chained by hashes as in
the owner's audit log. All of a client's ways to a server end in `Link`, and there is no other (`handout/link.py`); what
Flower's SuperNode sends comes that way, too (`flower/relay.py`).
"""

import base64
import hashlib
import logging
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedproxy.artifacts import os_error
from fedproxy.deployment.chain import Chain, read
from fedproxy.errors import ArtifactError
from fedproxy.foreign import plain

log = logging.getLogger(__name__)

LEDGER = "ledger.jsonl"
SUPERNODE = "SuperNode"
"""Where an answer goes first: to Flower's SuperNode on this machine. It leaves in parts, which are noted, too."""
PIECE_BYTES = 1 << 20
LINE_BYTES = 2 * PIECE_BYTES
_HEAD = re.compile(rb"([A-Z]+) ([!-~]{1,300}) HTTP/")
_KINDS = {
    "CONNECT": "proxy",
    "/fedproxy/welcome": "introduction",
    "/fedproxy/farewell": "farewell",
    "/listing": "hand-out",
    "/parts/": "hand-out",
    "/result": "hand-out",
    "/v1/fleet/push-": "answer",
    "/v1/fleet/pull-": "order",
    "/v1/fleet/confirm-": "order",
    "/v1/fleet/send-node-heartbeat": "heartbeat",
    "/v1/fleet/": "connection",
}
"""What a request begins with: its method, or its path → its kind."""


class Ledger:
    """Notes what leaves, from any thread.

    Args:
        path: The file; one that is there is gone on with.
        to: The server, as HOST:PORT.
        full: Whether the bytes themselves are kept.

    Raises:
        ArtifactError: the file is no ledger.
        UsageError: it cannot be written.
    """

    def __init__(self, path: Path, to: str, *, full: bool = False) -> None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise os_error(error, path.parent) from error
        self._chain, self._to, self._full, self._lock = Chain(path, LINE_BYTES), to, full, threading.Lock()
        log.info("What leaves this machine is noted in %s.", path)

    def leaves(self, request: bytes) -> None:
        """Note a request, head and body, that is about to leave; raises as `Chain.append` does.

        A kill loses no line. A power cut may lose those since the last answer: to wait for the disk at each of some
        twenty requests costs a round a third of a second.
        """
        found = _HEAD.match(request)
        method, target = (part.decode() for part in found.groups()) if found else ("", "")
        kind = next((kind for begin, kind in _KINDS.items() if begin == method or target.startswith(begin)), "other")
        self._note(kind, self._to, request, sync=False, request=f"{method} {target}".strip())

    def hands(self, kind: str, answer: bytes) -> None:
        """Note an answer that is about to be handed to Flower's SuperNode; raises as `Chain.append` does."""
        self._note(kind, SUPERNODE, answer, sync=True)

    def _note(self, kind: str, to: str, content: bytes, *, sync: bool, **more: str) -> None:
        with self._lock:
            for begin in range(0, len(content), PIECE_BYTES):
                piece = content[begin : begin + PIECE_BYTES]
                record: dict[str, Any] = {"time": datetime.now(UTC).isoformat(), "event": kind, "to": to, **more}
                record |= {"bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()}
                if self._full:
                    record["payload"] = base64.b64encode(piece).decode()
                self._chain.append(record, sync=sync)

    def close(self) -> None:
        """Close the file; from now on nothing can leave."""
        with self._lock:
            self._chain.close()


def check(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Read a ledger, and verify its chain, and each payload that it holds by its hash.

    Yields:
        Its lines in order, each with the line's own hash; what came before an error is right.

    Raises:
        ArtifactError: as of `chain.read`; or a line is none of a ledger, or its payload is another.
    """
    for number, (record, line) in enumerate(read(path, LINE_BYTES), 1):
        match record:
            case {"time": str(), "event": str(), "to": str(), "bytes": int(), "sha256": str()} if isinstance(
                record.get("request", ""), str
            ):
                pass
            case _:
                raise ArtifactError(f"{path}, line {number}: it is no line of a ledger.")
        if "payload" in record and _digest(record["payload"]) != (record["bytes"], record["sha256"]):
            raise ArtifactError(f"{path}, line {number}: its payload is not the one of its hash.")
        shown: dict[str, Any] = {
            key: plain(record[key], 300) for key in ("time", "event", "to", "request") if key in record
        }
        yield {**record, **shown}, line


def _digest(payload: object) -> tuple[int, str]:
    try:
        content = base64.b64decode(payload, validate=True) if isinstance(payload, str) else b""
    except ValueError:
        content = b""
    return len(content), hashlib.sha256(content).hexdigest()
