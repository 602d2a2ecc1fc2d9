"""Logs of JSON lines that are chained by hashes: the owner's audit log, and a client's ledger of what left.

Each line holds the SHA-256 of the line before (`before`), so `read` finds what was changed, put in or taken out within
a log. What is cut off at its end it does not find, unless the last line's hash was noted elsewhere.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedproxy.artifacts import os_error, parse_json
from fedproxy.errors import ArtifactError, UsageError

LINE_BYTES = 64 << 10
"""The longest line, unless a log's owner says otherwise."""
NONE_BEFORE = "0" * 64


class Chain:
    """A log that lines are appended to; a line is on the disk when `append` returns.

    Several processes may append to one file: each looks for what the others wrote since.

    Args:
        path: The log; one that is there is gone on with, without a last line that a power cut left incomplete.
        line_bytes: The longest line that it holds.

    Raises:
        ArtifactError: it is no such log.
        UsageError: the file cannot be written.
    """

    def __init__(self, path: Path, line_bytes: int = LINE_BYTES) -> None:
        self._path, self._line_bytes = path, line_bytes
        self._size, self._before = -1, NONE_BEFORE
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._catch_up()
        except OSError as error:
            raise os_error(error, path) from error

    def append(self, record: dict[str, Any], *, sync: bool = True) -> None:
        """Append a line of `record` and the hash of the line before.

        Args:
            record: What the line holds.
            sync: Whether it is on the disk when this returns, with all before; else a power cut may lose it.

        Raises:
            ResourceError: the disk is full; nothing was written.
            UsageError: it cannot be written, or was closed.
        """
        if self._file < 0:
            raise UsageError(f"{self._path} is closed: nothing can be added to it.")
        with contextlib.suppress(OSError):  # a file system may know no locks
            fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            self._catch_up()
            line = json.dumps({**record, "before": self._before}, allow_nan=False).encode()
            try:
                written = os.write(self._file, line + b"\n")
                if written <= len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if sync:
                    os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, self._size)
                raise
            self._size += len(line) + 1
            self._before = hashlib.sha256(line).hexdigest()
        except OSError as error:
            raise os_error(error, self._path) from error
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _catch_up(self) -> None:
        """Read the last line, if another process wrote it; what follows the last whole line is cut off."""
        size = os.fstat(self._file).st_size
        if size == self._size:
            return
        tail = os.pread(self._file, 2 * self._line_bytes, max(0, size - 2 * self._line_bytes))
        whole = tail[: tail.rfind(b"\n") + 1]
        if not whole and size > len(tail):
            raise ArtifactError(f"{self._path} is no log of fedproxy: its last line is too long. Move it away.")
        if len(whole) < len(tail):
            size -= len(tail) - len(whole)
            os.ftruncate(self._file, size)
        last = whole[:-1].rpartition(b"\n")[2]
        self._size, self._before = size, hashlib.sha256(last).hexdigest() if last else NONE_BEFORE

    def close(self) -> None:
        """Close the file; what is appended later is an error."""
        os.close(self._file)
        self._file = -1


def read(path: Path, line_bytes: int = LINE_BYTES) -> Iterator[tuple[dict[str, Any], str]]:
    """Read a log, and verify that each line holds the hash of the line before.

    Args:
        path: The log.
        line_bytes: The longest line that is read.

    Yields:
        The lines in order, each with its hash; what came before an error is right.

    Raises:
        ArtifactError: the log is missing, or a line (which is named) is damaged, or follows from no line before.
    """
    before, number = NONE_BEFORE, 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(line_bytes):
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
                yield record, before
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error
