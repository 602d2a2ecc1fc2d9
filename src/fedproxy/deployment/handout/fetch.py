"""Fetches a proxy: missing parts only, each checked by its hash while it arrives, into a cache on the client's disk.

What is there after a kill is found out by hashing it, not by notes: notes can be ahead of a disk that lost power,
and hashing costs little beside a network. A complete copy is taken for good while size and time of the last
change of every file are those noted when it was completed, so a file that anyone wrote to is noticed; all is then
hashed, and the damaged parts alone are fetched again. What a failing disk changes by itself is not noticed.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedproxy.artifacts import locked, new_file, os_error, parse_json, read_json, sync, write_json
from fedproxy.deployment.handout.download import Crew, Progress, open_file, tried
from fedproxy.deployment.handout.link import Link
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

    Returns:
        The folder of the complete, verified proxy.

    Raises:
        FederationError: the server cannot be reached, is not the right one, or refuses, or the proxy is too large.
        ArtifactError: what it sends is not what it should be.
        ResourceError: the disk is too small, or full.
        UsageError: the cache cannot be written, or an argument is impossible.
    """
    if not is_sha256(listing_sha256):
        raise ArtifactError(f"the proxy's identity {listing_sha256!r:.80} is no SHA-256.")
    place, work = Path(cache) / listing_sha256, Path(cache) / f".{listing_sha256}.partial"
    try:
        Path(cache).mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(Path(cache) / f".{listing_sha256}.lock"):
            if _is_intact(place):
                return place
            if place.exists():
                shutil.rmtree(work, ignore_errors=True)
                place.rename(work)
            work.mkdir(exist_ok=True)
            links = [Link(url, token, ca) for _ in range(max(1, connections))]
            try:
                listing = _listing(links[0], listing_sha256, work)
                if most is not None and listing.size > most:
                    raise FederationError(
                        f"The proxy has {listing.size} bytes, this client allows {most} at most (max_download)."
                    )
                _fill(work, listing, links, on_bytes or (lambda done, total: None))
            finally:
                for link in links:
                    link.close()
            work.rename(place)
            sync(Path(cache))
    except OSError as error:
        raise os_error(error, place) from error
    return place


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


def _listing(link: Link, sha256: str, work: Path) -> Listing:
    """The listing: the one kept in `work`, or the server's."""
    path = work / _LISTING
    content = path.read_bytes() if path.is_file() and path.stat().st_size <= LISTING_BYTES else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        content = tried(lambda: _get_listing(link), f"the listing from {link.where}", threading.Event())
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ArtifactError(f"{link.where} sent a listing other than {sha256[:12]}: it hands out another proxy.")
        with new_file(path) as file:
            file.write(content)
    return Listing.parse(parse_json(content, f"the listing from {link.where}"))


def _get_listing(link: Link) -> bytes:
    answer = link.get("/listing")
    if answer.length is None or answer.length > LISTING_BYTES:
        link.close()
        raise ArtifactError(f"{link.where} announces a listing of {answer.length} bytes, the limit is {LISTING_BYTES}.")
    with link.broken():
        return answer.read()


def _fill(work: Path, listing: Listing, links: list[Link], on_bytes: Callable[[int, int], None]) -> None:
    """Fetch what `work` lacks and note that it is complete."""
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
    missing = _missing(work, listing)
    lacking = sum(part.length for _, part in missing)
    free = shutil.disk_usage(work).free
    if lacking + _SPARE_BYTES > free:
        raise ResourceError(
            f"{work.parent}: {lacking / 1e9:.3g} GB of the proxy are to be fetched, {free / 1e9:.3g} GB of disk space "
            "are free. Free some space, or keep proxies on another disk."
        )
    Crew(work, links, missing, Progress(on_bytes, listing.size - lacking, listing.size)).work()
    for file in listing.files:
        sync(work / file.name)
    write_json(work / _COMPLETE, _state(work))


def _missing(work: Path, listing: Listing) -> list[tuple[File, Part]]:
    """The parts that are not there whole."""

    def is_there(job: tuple[File, Part]) -> bool:
        file, part = job
        with open_file(work / file.name) as handle:
            if os.lseek(handle, part.offset, os.SEEK_HOLE) < part.offset + part.length:
                return False
            return hash_range(handle, part.offset, part.length) == part.sha256

    jobs = [(file, part) for file in listing.files for part in file.parts]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [job for job, there in zip(jobs, pool.map(is_there, jobs), strict=True) if not there]
