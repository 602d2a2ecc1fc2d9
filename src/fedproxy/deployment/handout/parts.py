"""What is handed out: the files of a proxy cut into parts, each known by its SHA-256."""

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from fedproxy.artifacts import MANIFEST, Manifest, read_json
from fedproxy.checkpoint_files import CONFIG, INDEX, SINGLE, weight_names
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.federation.protocol import is_sha256
from fedproxy.side_files import SIDE_FILES, TOKENIZER_CONFIG, cleaned, is_settings

FORMAT = 1
PART_BYTES = 64 << 20
BUFFER_BYTES = 256 << 10
LISTING_BYTES = 16 << 20
"""The largest listing that is sent or read; one of `_MOST_PARTS` parts fits."""
_PART_LIMITS = (1 << 20, (2 << 30) - 1)
_MOST_PARTS, _MOST_FILES, _MOST_BYTES = 100_000, 1_000, 1 << 50
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
_PUBLIC_MANIFEST = ("format", "kind", "versions", "llm", "layer_map")
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md")
"""What the LLM's licence may oblige its owner to pass on."""


@dataclass(frozen=True)
class Part:
    """A piece of a file: `length` bytes from `offset`, and their SHA-256."""

    offset: int
    length: int
    sha256: str


@dataclass(frozen=True)
class File:
    """A file: its plain name, its size, and its parts, which follow each other without a gap."""

    name: str
    size: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Listing:
    """All that is handed out of a proxy, in the order of the files' names."""

    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @cached_property
    def content(self) -> bytes:
        """The listing as it is sent."""
        files = [
            {"name": file.name, "size": file.size, "parts": [[p.offset, p.length, p.sha256] for p in file.parts]}
            for file in self.files
        ]
        return json.dumps({"format": FORMAT, "files": files}, separators=(",", ":")).encode()

    @cached_property
    def sha256(self) -> str:
        """The identity of the listing, and by it of every byte of the proxy."""
        return hashlib.sha256(self.content).hexdigest()

    @staticmethod
    def parse(record: object) -> "Listing":
        """Check a listing that came from elsewhere: plain names, bounded sizes, parts that make up their files.

        Raises:
            ArtifactError: it is not one that `describe` makes.
        """
        _need(isinstance(record, dict) and record.keys() == {"format", "files"}, "it must hold format and files")
        assert isinstance(record, dict)
        _need(record["format"] == FORMAT, f"format must be {FORMAT}; it was made by another version")
        _need(isinstance(record["files"], list), "files must be a list")
        _need(0 < len(record["files"]) <= _MOST_FILES, f"it must hold 1 to {_MOST_FILES} files")
        listing = Listing(tuple(_file(entry) for entry in record["files"]))
        names = [file.name for file in listing.files]
        _need(names == sorted(names), "names must be sorted")
        _need(len({name.lower() for name in names}) == len(names), "names must differ by more than case")
        _need(sum(len(file.parts) for file in listing.files) <= _MOST_PARTS, f"more than {_MOST_PARTS} parts")
        _need(listing.size <= _MOST_BYTES, f"more than {_MOST_BYTES} bytes")
        return listing


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ArtifactError(f"the listing of the proxy's files cannot be used: {what}.")


def _file(entry: object) -> File:
    _need(isinstance(entry, dict) and entry.keys() == {"name", "size", "parts"}, "a file has name, size and parts")
    assert isinstance(entry, dict)
    name, size, rows = entry["name"], entry["size"], entry["parts"]
    _need(isinstance(name, str) and _NAME.fullmatch(name) is not None, f"{name!r:.80} is no plain file name")
    _need(type(size) is int and 0 <= size <= _MOST_BYTES, f"the size of {name} is {size!r:.40}")
    _need(isinstance(rows, list), f"the parts of {name} are no list")
    parts, end = [], 0
    for row in rows:
        _need(isinstance(row, list) and len(row) == 3, f"a part of {name} is no offset, length and hash")
        offset, length, sha256 = row
        _need(
            type(offset) is int and type(length) is int and offset == end and 0 < length <= _PART_LIMITS[1],
            f"{name} has a part of {length!r:.40} bytes at {offset!r:.40}, expected at {end}",
        )
        _need(is_sha256(sha256), f"a hash of {name} is {sha256!r:.80}")
        parts.append(Part(offset, length, sha256))
        end += length
    _need(end == size, f"the parts of {name} make up {end} bytes, not {size}")
    return File(name, size, tuple(parts))


def hash_range(handle: int, offset: int, length: int) -> str:
    """SHA-256 of bytes of an open file, which may end early; threads may call it side by side."""
    digest, buffer, end = hashlib.sha256(), memoryview(bytearray(min(BUFFER_BYTES, length))), offset + length
    while offset < end:
        count = os.preadv(handle, [buffer[: end - offset]], offset)
        if count == 0:
            break
        digest.update(buffer[:count])
        offset += count
    return digest.hexdigest()


@contextlib.contextmanager
def opened(proxy: Path) -> Iterator[dict[str, int]]:
    """Open what is handed out of a proxy: a file handle by name; what is on no list stays.

    That is its weights and settings, what transformers' tokenizers read, licences, and Python code if its settings name
    some. Settings leave cleaned (`side_files.cleaned`), `fedproxy.json` with no more than a client needs. Links are
    refused, so that nothing from outside the folder can leave.

    Raises:
        ArtifactError: the folder is no proxy, or one of these is no plain file, or has another name elsewhere.
    """
    proxy = Path(proxy)
    kind = Manifest.read(proxy).kind
    if kind != "proxy":
        raise ArtifactError(f'{proxy} is a "{kind}", and only a proxy is handed out.')
    with contextlib.ExitStack() as stack:
        handles = {}
        for name in _leaving(proxy):
            if not _NAME.fullmatch(name):
                raise ArtifactError(f"{proxy / name}: only letters, digits and ._+- may stand in a name. Rename it.")
            handles[name] = _open(proxy / name)
            stack.callback(os.close, handles[name])
            status = os.fstat(handles[name])
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise ArtifactError(f"{proxy / name} is no plain file, or a hard link. Put a copy of the file there.")
            if name in (MANIFEST, INDEX) or is_settings(name):
                record = read_json(proxy / name)
                left = cleaned(name, _public(record) if name == MANIFEST else record)
                if left != record:
                    file = stack.enter_context(tempfile.TemporaryFile())
                    file.write((json.dumps(left, indent=2) + "\n").encode())
                    file.flush()
                    handles[name] = file.fileno()
        yield handles


def _leaving(proxy: Path) -> list[str]:
    """The names of what a proxy holds of all that may leave, in order."""
    weights = weight_names(proxy)
    names = (MANIFEST, CONFIG, *weights, *_LICENCES, *([] if weights == [SINGLE] else [INDEX]))
    settings = (proxy / name for name in (CONFIG, TOKENIZER_CONFIG))
    code = any(file.is_file() and cleaned(file.name, read_json(file)).get("auto_map") for file in settings)
    patterns = (*SIDE_FILES, *(["[!.]*.py"] if code else []))
    return sorted(
        name for name in os.listdir(proxy) if name in names or any(fnmatchcase(name, each) for each in patterns)
    )


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a link; put the file itself there" if path.is_symlink() else error.strerror
        raise ArtifactError(f"{path} cannot be handed out: {reason}.") from error


def _public(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a client needs of a manifest."""
    record = {key: manifest[key] for key in _PUBLIC_MANIFEST if key in manifest}
    return {**record, "llm": {key: manifest["llm"][key] for key in ("sha256", "blocks")}}


def describe(proxy: Path, part_bytes: int = PART_BYTES) -> Listing:
    """Cut a proxy's files into parts and hash them; memory stays flat.

    Args:
        proxy: The proxy.
        part_bytes: Bytes of a part; the last one of a file is what remains.

    Returns:
        The listing.

    Raises:
        UsageError: `part_bytes` is below 1 MiB, or 2 GiB and above, or gives too many parts.
        ArtifactError: the folder is no proxy, or holds what cannot be handed out.
    """
    least, most = _PART_LIMITS
    if not least <= part_bytes <= most:
        raise UsageError(f"part_bytes = {part_bytes}: must be from {least} (1 MiB) to {most} (below 2 GiB).")
    with opened(proxy) as handles:
        return list_parts(handles, part_bytes)


def list_parts(handles: Mapping[str, int], part_bytes: int = PART_BYTES) -> Listing:
    """Cut open files, by name, into parts and hash them.

    Raises:
        UsageError: `part_bytes` gives too many parts.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        spans = {
            name: [(begin, min(part_bytes, size - begin)) for begin in range(0, size, part_bytes)]
            for name, size in ((name, os.fstat(handle).st_size) for name, handle in handles.items())
        }
        count = sum(map(len, spans.values()))
        if count > _MOST_PARTS:
            raise UsageError(f"part_bytes = {part_bytes} makes {count} parts; {_MOST_PARTS} are the most. Raise it.")
        try:
            pending = {
                name: [(*span, pool.submit(hash_range, handles[name], *span)) for span in found]
                for name, found in spans.items()
            }
            files = {
                name: tuple(Part(begin, length, digest.result()) for begin, length, digest in rows)
                for name, rows in pending.items()
            }
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    listing = Listing(tuple(File(name, sum(part.length for part in parts), parts) for name, parts in files.items()))
    return Listing.parse(json.loads(listing.content))
