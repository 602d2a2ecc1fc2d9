"""A client's cache of proxies: missing parts only are fetched or taken, each checked by its hash.

What is there after a kill is found out by hashing it, not by notes: notes can be ahead of a disk that lost power,
and hashing costs little beside a network. A complete copy is taken for good while size and time of the last
change of every file are those noted when it was completed, so a file that anyone wrote to is noticed; all is then
hashed, and the damaged parts alone are fetched again. What a failing disk changes by itself is not noticed.
"""

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedproxy.artifacts import locked, new_file, os_error, parse_json, read_json, sync, write_json
from fedproxy.deployment.handout.download import Crew, Progress, open_file, tried, write
from fedproxy.deployment.handout.link import Link, OnRequest
from fedproxy.deployment.handout.parts import LISTING_BYTES, File, Listing, Part, hash_range
from fedproxy.errors import ArtifactError, FederationError, ResourceError, UsageError
from fedproxy.federation.protocol import is_sha256

_LISTING, _COMPLETE = ".listing.json", ".complete.json"
_SPARE_BYTES = 1 << 20


def default_cache() -> Path:
    """Where proxies are kept: $XDG_CACHE_HOME/fedproxy/proxies, by default below ~/.cache.

    Raises:
        UsageError: there is no home directory.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedproxy" / "proxies"
    except RuntimeError as error:
        raise UsageError("This user has no home directory to keep proxies in. Give --cache DIR.") from error


def fetch_proxy(
    url: str,
    token: str,
    listing_sha256: str,
    cache: Path,
    ca: bytes | None,
    on_bytes: Callable[[int, int], None] | None = None,
    connections: int = 2,
    most: int | None = None,
    on_request: OnRequest = lambda request: None,
    listing_path: str = "/listing",
) -> Path:
    """Bring a proxy into the cache, unless it is there.

    Killed at any moment and called again, it goes on: parts that are complete are not fetched again. Processes that
    want the same proxy at the same time wait for the first of them.

    Args:
        url: "https://HOST:PORT" of the hand-out.
        token: What the server issued to this client.
        listing_sha256: Which proxy: the SHA-256 of its listing.
        cache: Folder of proxies; the proxy becomes a folder in it, named by `listing_sha256`.
        ca: The certificate (PEM) that the server's must be signed by; the machine's own authorities if none.
        on_bytes: Told how many bytes are there and how many there will be.
        connections: Parts fetched side by side.
        most: Bytes that the proxy may have; none for as many as the disk holds.
        on_request: Told each request before it leaves.
        listing_path: Where the server has the listing: of the proxy, or of the federation's result.

    Returns:
        The folder of the complete, verified proxy.

    Raises:
        FederationError: the server cannot be reached, is not the right one, or refuses, or the proxy is too large.
        ArtifactError: what it sends is not what it should be.
        ResourceError: the disk is too small, or full.
        UsageError: the cache cannot be written, or an argument is impossible.
    """
    place = Path(cache) / listing_sha256
    with _unfinished(Path(cache), listing_sha256) as work:
        if work is None:
            return place
        links = [Link(url, token, ca, on_request) for _ in range(max(1, connections))]
        first = links[0]

        def asked() -> bytes:
            return tried(
                lambda: _get_listing(first, listing_path), f"the listing from {first.where}", threading.Event()
            )

        try:
            listing = _listing(work, listing_sha256, asked, first.where, most)
            missing = _missing(work, listing)
            lacking = sum(part.length for _, part in missing)
            progress = Progress(on_bytes or (lambda done, total: None), listing.size - lacking, listing.size)
            Crew(work, links, missing, progress).work()
        finally:
            for link in links:
                link.close()
        _finish(work, place, listing)
    return place


def take_parts(
    listing: bytes, parts: Mapping[str, bytes], listing_sha256: str, cache: Path, most: int | None = None
) -> list[str]:
    """Take what comes of a proxy into the cache, where it comes by itself, a message at a time.

    Args:
        listing: The listing, as it came.
        parts: SHA-256 → what came as this part; those that are not missing are passed over.
        listing_sha256: Which proxy; it and the rest are as of `fetch_proxy`.
        cache: Folder of proxies.
        most: Bytes that the proxy may have.

    Returns:
        The SHA-256 of the parts that are still missing, sorted; none once the proxy is complete and verified.

    Raises:
        FederationError: the proxy is too large.
        ArtifactError: listing or parts are not what they should be.
        ResourceError: the disk is too small, or full.
        UsageError: the cache cannot be written.
    """
    left = set()
    with _unfinished(Path(cache), listing_sha256) as work:
        if work is None:
            return []
        known = _listing(work, listing_sha256, lambda: listing, "the server", most)
        for file, part in _missing(work, known):
            if (content := parts.get(part.sha256)) is None:
                left.add(part.sha256)
                continue
            if hashlib.sha256(content).hexdigest() != part.sha256:
                raise ArtifactError(f"part {part.sha256[:12]} of {file.name} from the server has another SHA-256.")
            with open_file(work / file.name) as handle:
                write(handle, memoryview(content), part.offset)
        if not left:
            _finish(work, Path(cache) / listing_sha256, known)
    return sorted(left)


def find_proxy(listing_sha256: str, cache: Path) -> Path | None:
    """The folder of a proxy that is in the cache, complete."""
    place = Path(cache) / listing_sha256
    return place if is_sha256(listing_sha256) and _is_intact(place) else None


@contextlib.contextmanager
def _unfinished(cache: Path, sha256: str) -> Iterator[Path | None]:
    """The folder in which a proxy is put together, for this process alone; none if it is there, complete."""
    if not is_sha256(sha256):
        raise ArtifactError(f"the proxy's identity {sha256!r:.80} is no SHA-256.")
    place, work = cache / sha256, cache / f".{sha256}.partial"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(cache / f".{sha256}.lock"):
            if _is_intact(place):
                yield None
                return
            if place.exists():
                shutil.rmtree(work, ignore_errors=True)
                place.rename(work)
            work.mkdir(exist_ok=True)
            yield work
    except OSError as error:
        raise os_error(error, place) from error


def _finish(work: Path, place: Path, listing: Listing) -> None:
    """Note that all of a proxy is there, and put it in its place."""
    for file in listing.files:
        sync(work / file.name)
    write_json(work / _COMPLETE, _state(work))
    work.rename(place)
    sync(place.parent)


def _state(folder: Path) -> dict[str, list[int]]:
    """Size and time of the last change of every file; a write cannot hide from the latter as it can from mtime."""
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries if entry.name != _COMPLETE}
    return {name: [status.st_size, status.st_ctime_ns] for name, status in sorted(found.items())}


def _is_intact(place: Path) -> bool:
    try:
        return bool(read_json(place / _COMPLETE, LISTING_BYTES) == _state(place))
    except (ArtifactError, FileNotFoundError):
        return False


def _listing(work: Path, sha256: str, asked: Callable[[], bytes], where: str, most: int | None) -> Listing:
    """The listing: the one kept in `work`, or the server's."""
    path = work / _LISTING
    content = path.read_bytes() if path.is_file() and path.stat().st_size <= LISTING_BYTES else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        content = asked()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ArtifactError(f"{where} sent a listing other than {sha256[:12]}: it hands out another proxy.")
        with new_file(path) as file:
            file.write(content)
    listing = Listing.parse(parse_json(content, f"the listing from {where}"))
    if most is not None and listing.size > most:
        raise FederationError(f"The proxy has {listing.size} bytes, this client allows {most} at most (max_download).")
    return listing


def _get_listing(link: Link, path: str) -> bytes:
    answer = link.get(path)
    if answer.length is None or answer.length > LISTING_BYTES:
        link.close()
        raise ArtifactError(f"{link.where} announces a listing of {answer.length} bytes, the limit is {LISTING_BYTES}.")
    with link.broken():
        return answer.read()


def _missing(work: Path, listing: Listing) -> list[tuple[File, Part]]:
    """The parts that are not there whole; what is no file of the proxy is removed, and every file gets its size.

    Raises:
        ResourceError: the disk has no room for them.
    """
    known = {file.name for file in listing.files}
    for entry in list(os.scandir(work)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry)
        elif entry.name != _LISTING and (entry.name not in known or not entry.is_file(follow_symlinks=False)):
            os.unlink(entry)
    for file in listing.files:
        with open_file(work / file.name) as handle:
            if os.fstat(handle).st_size != file.size:
                os.ftruncate(handle, file.size)

    def is_there(job: tuple[File, Part]) -> bool:
        file, part = job
        with open_file(work / file.name) as handle:
            if os.lseek(handle, part.offset, os.SEEK_HOLE) < part.offset + part.length:
                return False
            return hash_range(handle, part.offset, part.length) == part.sha256

    jobs = [(file, part) for file in listing.files for part in file.parts]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        missing = [job for job, there in zip(jobs, pool.map(is_there, jobs), strict=True) if not there]
    lacking, free = sum(part.length for _, part in missing), shutil.disk_usage(work).free
    if lacking + _SPARE_BYTES > free:
        raise ResourceError(
            f"{work.parent}: {lacking / 1e9:.3g} GB of the proxy are to be fetched, {free / 1e9:.3g} GB of disk space "
            "are free. Free some space, or keep proxies on another disk."
        )
    return missing
