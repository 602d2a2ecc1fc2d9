"""What a crash leaves on disk, at every moment of a job: no chance, no clock.

A process can be killed, or a disk be full, before each of its changes to a folder. `moments` runs a job once and gives
the folder as a kill at each of these would leave it; `failing` lets one change fail.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

GROWING = ("mkdir", "rename", "replace", "symlink", "fsync", "truncate", "ftruncate", "pwrite")
SHRINKING = ("unlink", "remove", "rmdir")
Stamp = dict[int, tuple[int, int]]


def _path(name: Any, folder: int | None) -> Path:
    """The path that a call of `os` is about: a name, one in an open folder, or an open file."""
    if isinstance(name, int):
        return Path(os.readlink(f"/proc/self/fd/{name}"))
    return Path("" if folder is None else os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(name)).absolute()


@contextlib.contextmanager
def _watched(folder: Path, before: Callable[[str, Path, Any], None]) -> Iterator[None]:
    """Call `before` with the call, what it makes and its first argument, before every change to `folder`."""
    lock, busy = threading.RLock(), threading.local()

    def watch(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **named: Any) -> Any:
            path = _path(rest[0] if name in ("symlink", "rename", "replace") else first, named.get("dir_fd"))
            writes = name != "open" or rest[0] & os.O_CREAT
            if writes and path.is_relative_to(folder) and not getattr(busy, "now", False):
                with lock:
                    busy.now = True
                    try:
                        before(name, path, first)
                    finally:
                        busy.now = False
            return real(first, *rest, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in (*GROWING, *SHRINKING, "open"):
            patch.setattr(os, name, watch(name, getattr(os, name)))
        yield


def _stamps(folder: Path) -> Stamp:
    files = [folder] if folder.is_file() else folder.rglob("*")
    found = [path.stat() for path in files if path.is_file() and not path.is_symlink()]
    return {status.st_ino: (status.st_size, status.st_mtime_ns) for status in found}


def _written(folder: Path, since: Stamp) -> Iterator[tuple[Path, int]]:
    """Files that were written since then, and how many bytes they had."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            size, time = since.get(status.st_ino, (0, 0))
            if (status.st_size, status.st_mtime_ns) != (size, time):
                yield path, size if size < status.st_size else 0


def digest(folder: Path) -> str:
    """A hash of every name and byte in a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found.update(f"{path.relative_to(folder)}\0{path.is_dir()}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


def moments(job: Callable[[], object], folder: Path, kept: Path, *, halves: bool = True) -> list[Path]:
    """Run `job` to its end, and keep what a kill before each of its changes to `folder` would leave.

    Whatever gets a name that begins with no dot has to have been synced since it was written.

    Args:
        job: The job.
        folder: What it changes; it exists.
        kept: Where the copies go.
        halves: Keep also those in which half of what was written since the moment before has arrived.

    Returns:
        The copies, in order, no two of them alike; the last is what the whole job leaves.
    """
    found: list[Path] = []
    seen: set[str] = set()
    begun = last = _stamps(folder)
    synced: Stamp = {}

    def keep(half: list[tuple[Path, int]]) -> None:
        copy = kept / f"{len(found):04d}"
        shutil.copytree(folder, copy, symlinks=True)
        for path, size in half:
            os.truncate(copy / path.relative_to(folder), (size + path.stat().st_size) // 2)
        if (state := digest(copy)) in seen:
            shutil.rmtree(copy)
        else:
            seen.add(state)
            found.append(copy)

    def before(call: str, path: Path, first: Any) -> None:
        nonlocal last
        if call == "fsync" and path.is_file():
            synced.update(_stamps(path))
        if call in ("rename", "replace") and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            unsynced = {
                file for file, stamp in _stamps(Path(first)).items() if stamp not in (begun.get(file), synced.get(file))
            }
            assert not unsynced, f"{path} comes into its place before it is safe on the disk"
        if half := [(file, size) for file, size in _written(folder, last) if halves]:
            keep(half)
        keep([])
        last = _stamps(folder)

    with _watched(folder, before):
        job()
    keep([])
    return found


@contextlib.contextmanager
def failing(folder: Path, number: int, error: BaseException | None = None) -> Iterator[list[str]]:
    """Let the `number`-th change to `folder` that needs room fail, by default because the disk is full.

    Yields:
        The calls until then; the last one failed, if there were so many.
    """
    calls: list[str] = []

    def before(call: str, path: Path, first: Any) -> None:
        if call not in SHRINKING:
            calls.append(call)
            if len(calls) == number:
                raise error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with _watched(folder, before):
        yield calls
