"""Downloads parts over several connections: retried, continued where they broke off, hashed while they arrive."""

import contextlib
import hashlib
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from fedproxy.deployment.handout.link import BrokenLinkError, Link
from fedproxy.deployment.handout.parts import BUFFER_BYTES, File, Part
from fedproxy.errors import ArtifactError, FederationError

TRIES = 6
"""How often a request is tried before its failure is final."""
PAUSE_SECONDS = 0.5
"""The pause after the first failure; it doubles with each, and up to as much again is added at random."""
T = TypeVar("T")


def tried(request: Callable[[], T], what: str, stop: threading.Event) -> T:
    """Make a request, and again after pauses while the connection breaks.

    Raises:
        FederationError: no attempt succeeded.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return request()
        except BrokenLinkError as error:
            last = error
        pause = PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(1, 2)
        if stop.wait(pause if attempt < TRIES else 0):
            break
    raise FederationError(
        f"{what} could not be fetched, {TRIES} attempts failed: {last}. Join again to go on from here."
    )


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[int]:
    """A handle to read and write a plain file, which is made if it is missing."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


class Progress:
    """Counts bytes for all threads."""

    def __init__(self, on_bytes: Callable[[int, int], None], done: int, total: int) -> None:
        self._on_bytes, self._done, self._total = on_bytes, done, total
        self._lock = threading.Lock()
        self.add(0)

    def add(self, count: int) -> None:
        """Count and tell."""
        with self._lock:
            self._done += count
            self._on_bytes(self._done, self._total)


class Crew:
    """A thread a connection; together they fetch the parts in order."""

    def __init__(self, work: Path, links: list[Link], parts: list[tuple[File, Part]], progress: Progress) -> None:
        self._folder, self._links, self._parts, self._progress = work, links, deque(parts), progress
        self._stop = threading.Event()

    def work(self) -> None:
        """Fetch all parts; the first error ends it."""
        with ThreadPoolExecutor(len(self._links)) as pool:
            try:
                for done in as_completed([pool.submit(self._fetch_parts, link) for link in self._links]):
                    done.result()
            except BaseException:
                self._stop.set()
                for link in self._links:
                    link.abort()
                raise

    def _fetch_parts(self, link: Link) -> None:
        while not self._stop.is_set():
            try:
                file, part = self._parts.popleft()
            except IndexError:
                return
            with open_file(self._folder / file.name) as handle:
                self._fetch(link, file.name, part, handle)

    def _fetch(self, link: Link, name: str, part: Part, handle: int) -> None:
        what = f"part {part.sha256[:12]} of {name} from {link.where}"
        buffer = memoryview(bytearray(min(BUFFER_BYTES, part.length)))
        digest, have = hashlib.sha256(), 0

        def go_on() -> None:
            nonlocal have
            answer = link.get(f"/parts/{part.sha256}", have)
            if answer.length != part.length - have:
                link.close()
                raise ArtifactError(
                    f"{what}: {answer.length} bytes are announced where {part.length - have} are expected."
                )
            while have < part.length and not self._stop.is_set():
                with link.broken():
                    count = answer.readinto(buffer[: part.length - have])
                if count == 0:
                    link.close()
                    raise BrokenLinkError(f"it ended after {have} of {part.length} bytes")
                write(handle, buffer[:count], part.offset + have)
                digest.update(buffer[:count])
                have += count
                self._progress.add(count)

        tried(go_on, what, self._stop)
        if not self._stop.is_set() and digest.hexdigest() != part.sha256:
            raise ArtifactError(
                f"{what} has another SHA-256: the owner's files were changed. Ask the owner to restart."
            )


def write(handle: int, piece: memoryview, offset: int) -> None:
    """Write all of a piece to its place in an open file."""
    while piece:
        count = os.pwrite(handle, piece, offset)
        piece, offset = piece[count:], offset + count
