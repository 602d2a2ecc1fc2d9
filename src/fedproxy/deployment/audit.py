"""The owner's audit log: who came, who was refused and why, what went out; a line each, chained by hashes."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedproxy.deployment.chain import Chain, read
from fedproxy.foreign import plain

AUDIT = "audit.jsonl"
LINES_A_MINUTE = 10
"""Of each event and client so many lines a minute; more are counted."""
_MINUTE = 60.0
_MOST_LETTERS = 300


class Audit:
    """Appends to an audit log, from any thread; a line is on the disk when `note` returns.

    No stranger can fill the disk: beyond `LINES_A_MINUTE` of one event and client, a minute's notes become one line
    with their number (`more`), written by whatever is noted or flushed first when the minute is over.

    Args:
        path: The log; one that is there is gone on with, without a last line that a power cut left incomplete.
        clock: Seconds, rising.

    Raises:
        ArtifactError: it is no audit log.
        UsageError: the file cannot be written.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._chain, self._clock, self._lock = Chain(path), clock, threading.Lock()
        self._minutes: dict[tuple[str, str], tuple[float, int]] = {}

    def note(self, event: str, client: str = "", **fields: str | int | float) -> None:
        """Append a line.

        Args:
            event: What happened: one of few words of ours.
            client: The name of a client that has proved who it is; empty for strangers, who share a minute's lines.
            fields: What else is known. Texts may be foreign: they are made plain, and cut.

        Raises:
            ResourceError: the disk is full; nothing was written.
            UsageError: it cannot be written.
        """
        with self._lock:
            self._flush()
            begun, count = self._minutes.get((event, client), (self._clock(), 0))
            if count < LINES_A_MINUTE:
                self._append(event, client, fields)
            self._minutes[event, client] = (begun, count + 1)

    def flush(self) -> None:
        """Write how often what was not written happened in the minutes that are over; raises as `note` does."""
        with self._lock:
            self._flush()

    def close(self) -> None:
        """Write what is counted, and close the log; raises as `note` does."""
        with self._lock:
            try:
                self._flush(all_of_them=True)
            finally:
                self._chain.close()

    def __enter__(self) -> "Audit":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _flush(self, *, all_of_them: bool = False) -> None:
        now = self._clock()
        over = [key for key, (begun, _) in self._minutes.items() if all_of_them or now - begun >= _MINUTE]
        for event, client in over:
            if (more := self._minutes[event, client][1] - LINES_A_MINUTE) > 0:
                self._append(event, client, {"more": more})
            del self._minutes[event, client]

    def _append(self, event: str, client: str, fields: dict[str, Any]) -> None:
        texts = {"client": client, **fields} if client else fields
        shown = {key: plain(value, _MOST_LETTERS) if isinstance(value, str) else value for key, value in texts.items()}
        self._chain.append({"time": datetime.now(UTC).isoformat(), "event": event, **shown})


def check(path: Path) -> Iterator[dict[str, Any]]:
    """Read an audit log, and verify that each line holds the hash of the line before.

    Yields:
        The events in order, each with the hash of its line (`sha256`); what came before an error is right.

    Raises:
        ArtifactError: the log is missing, or a line (which is named) is damaged, or follows from no line before.
    """
    for record, sha256 in read(path):
        yield {**record, "sha256": sha256}
