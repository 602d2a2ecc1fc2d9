"""The owner's audit log: who came, who was refused and why, what went out; a line each, chained by hashes.

Each line of RUN/audit.jsonl holds the SHA-256 of the line before, so `check` finds what was changed, put in or taken
out within the log. What is cut off at its end it does not find, unless the last line's hash was noted elsewhere.
"""

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedproxy.artifacts import os_error, parse_json
from fedproxy.errors import ArtifactError
from fedproxy.foreign import plain

AUDIT = "audit.jsonl"
LINES_A_MINUTE = 10
"""Of each event and client so many lines a minute; more are counted."""
_MINUTE = 60.0
_MOST_LETTERS = 300
_MOST_BYTES = 64 << 10
_NONE_BEFORE = "0" * 64


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
        self._path, self._clock, self._lock = path, clock, threading.Lock()
        self._minutes: dict[tuple[str, str], tuple[float, int]] = {}
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._size, last = _cut_to_whole_lines(self._file, path)
        except OSError as error:
            raise os_error(error, path) from error
        self._before = hashlib.sha256(last).hexdigest() if last else _NONE_BEFORE

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
                os.close(self._file)

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
        record = {"time": datetime.now(UTC).isoformat(), "event": event, **shown, "before": self._before}
        line = json.dumps(record, allow_nan=False).encode()
        try:
            written = os.write(self._file, line + b"\n")
            if written <= len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise os_error(error, self._path) from error
        self._size += len(line) + 1
        self._before = hashlib.sha256(line).hexdigest()


def check(path: Path) -> Iterator[dict[str, Any]]:
    """Read an audit log, and verify that each line holds the hash of the line before.

    Yields:
        The events in order, each with the hash of its line (`sha256`); what came before an error is right.

    Raises:
        ArtifactError: the log is missing, or a line (which is named) is damaged, or follows from no line before.
    """
    before, number = _NONE_BEFORE, 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(_MOST_BYTES):
                number += 1
                record = parse_json(line, f"{path}, line {number},")
                if not (line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("event"), str)):
                    raise ArtifactError(f"{path}, line {number}: it is no whole event.")
                if record.get("before") != before:
                    raise ArtifactError(
                        f"{path}, line {number}: it does not follow from the line before. One of the two was changed, "
                        "or lines between them are missing."
                    )
                before = hashlib.sha256(line[:-1]).hexdigest()
                yield {**record, "sha256": before}
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error


def _cut_to_whole_lines(file: int, path: Path) -> tuple[int, bytes]:
    """The size of the log and its last line, after what follows the last whole line was cut off."""
    size = os.fstat(file).st_size
    tail = os.pread(file, 2 * _MOST_BYTES, max(0, size - 2 * _MOST_BYTES))
    whole = tail[: tail.rfind(b"\n") + 1]
    if not whole and size > len(tail):
        raise ArtifactError(f"{path} is no audit log: its last line is too long. Move it away.")
    if len(whole) < len(tail):
        size -= len(tail) - len(whole)
        os.ftruncate(file, size)
    return size, whole[:-1].rpartition(b"\n")[2]
