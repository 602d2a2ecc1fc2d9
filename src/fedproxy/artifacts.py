"""What lies on disk: safetensors and JSON, written to a temporary name, synced, then renamed.

Nothing here trusts a file: a safetensors header is checked before a tensor is touched, JSON is parsed
strictly, and every failure is an `ArtifactError` that names the file.
"""

import contextlib
import errno
import fcntl
import glob
import importlib.metadata
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fedproxy.errors import ArtifactError, FedproxyError, ResourceError, UsageError

FORMAT = 1
MANIFEST = "fedproxy.json"
CONFIG_BYTES = 4 << 20
"""The largest configuration that is read; parsed, JSON takes some twenty times its size."""


def os_error(error: OSError, path: Path) -> FedproxyError:
    """Translate an operating-system error at `path` into ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        return ResourceError(f"{path}: {error.strerror}. Free some space and run the command again.")
    return UsageError(f"{path}: cannot write ({error.strerror or error}). Choose a path that can be written.")


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk, whatever becomes of this machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: Path, patience: float = math.inf, busy: str = "") -> Iterator[None]:
    """Hold the lock of a file, which is made if it is missing, or of a directory; a killed process lets it go.

    Where the file system knows no locks, as some of networks do not, nobody waits.

    Raises:
        UsageError: another process still holds it after `patience` seconds (`busy`), or it cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        handle = os.open(path, made | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise os_error(error, path) from error
    try:
        until = time.monotonic() + patience
        while _lock(handle) is False:
            if time.monotonic() > until:
                raise UsageError(busy)
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Take the lock of an open file, unless another process has it; none where the file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _abandoned(path: Path) -> bool:
    """Whether `path` is the leftover of a writer that was killed."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _lock(handle) is True
    finally:
        os.close(handle)


def _beside(path: Path, kind: str) -> Path:
    """A free name beside `path` for what is not complete yet, or not wanted any more."""
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(4)}")


def destined(path: Path) -> Path:
    """The path that what is still being written will have; any other path as it is."""
    unfinished = re.fullmatch(r"\.(.+)\.tmp-[0-9a-f]{8}", path.name)
    return path.with_name(unfinished[1]) if unfinished else path


def _clear_up(path: Path) -> None:
    """Remove what killed writers of `path` left beside it, after putting back what one was about to replace."""
    name = glob.escape(path.name)
    for old in path.parent.glob(f".{name}.old-*"):
        if _abandoned(old):
            if not path.exists() and (old / path.name).exists():
                (old / path.name).rename(path)
            shutil.rmtree(old, ignore_errors=True)
    for leftover in path.parent.glob(f".{name}.tmp-*"):
        if _abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _within(inner: Path, outer: Path) -> bool:
    """Whether `inner` is `outer` or lies in it, symbolic links resolved."""
    real = Path(os.path.realpath(inner))
    return outer.exists() and any(place.exists() and place.samefile(outer) for place in (real, *real.parents))


def check_spared(path: Path, inputs: Iterable[str | Path]) -> None:
    """Check that nothing that is read goes when `path` is replaced.

    Args:
        path: What is to be replaced.
        inputs: Files and directories that are read; one that does not exist, as a Hub id, is passed over.

    Raises:
        UsageError: one of them, or what a link in it points to, is `path` or lies in it.
    """
    for given in map(Path, inputs):
        links = [item for item in given.iterdir() if item.is_symlink()] if given.is_dir() else []
        if any(_within(item, path) for item in (given, *links)):
            raise UsageError(f"{path} is or contains {given}, which is read. Give another path to write.")


def check_output(path: Path, inputs: Iterable[str | Path], *, overwrite: bool) -> None:
    """Check, before anything is loaded, that a directory may be made at `path`.

    Args:
        path: The directory to write.
        inputs: As of `check_spared`.
        overwrite: Replace a directory that fedproxy made.

    Raises:
        UsageError: `path` is, holds or lies in one of the inputs; or it exists and `overwrite` is false; or something
            is there that fedproxy did not make.
    """
    inputs = list(inputs)
    check_spared(path, inputs)
    for given in map(Path, inputs):
        if _within(path, given):
            raise UsageError(f"{path} lies in {given}, which is read. Give another path to write.")
    _check_free(path, overwrite, MANIFEST)


def _check_free(path: Path, overwrite: bool, sign: str) -> None:
    """Check that nothing is at `path`, or with `overwrite` a directory that holds the file `sign`, or nothing."""
    if not path.exists():
        return
    if not overwrite:
        raise UsageError(f"{path} exists. Give another path, or --overwrite to replace it.")
    if not path.is_dir() or (any(path.iterdir()) and not (path / sign).is_file()):
        raise UsageError(f"{path} exists and was not made by fedproxy: it holds no {sign}. Give another path.")


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool = False, sign: str = MANIFEST) -> Iterator[Path]:
    """Give a temporary sibling of `path` to fill; it becomes `path` only if the block ends well.

    What a killed process left of an earlier attempt is removed first.

    Args:
        path: The directory to make.
        overwrite: Replace one that was made before.
        sign: The file by which such a one is known.

    Raises:
        UsageError: `path` exists and `overwrite` is false, or it is not such a one; or its parent cannot be written.
        ResourceError: the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(path)
        _check_free(path, overwrite, sign)
        temporary = _beside(path, "tmp")
        temporary.mkdir()
    except OSError as error:
        raise os_error(error, path) from error
    try:
        with locked(temporary):
            yield temporary
            for item in sorted(temporary.rglob("*")):
                sync(item)
            sync(temporary)
            _check_free(path, overwrite, sign)
            if path.exists():
                old = _beside(path, "old")
                old.mkdir()
                with locked(old):
                    path.rename(old / path.name)
                    temporary.rename(path)
                shutil.rmtree(old)
            else:
                temporary.rename(path)
            sync(path.parent)
    except OSError as error:
        raise os_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            _clear_up(path)


def check_file(path: Path, *, overwrite: bool) -> None:
    """Check that a file may be written to `path`.

    Raises:
        UsageError: it exists and `overwrite` is false, or a directory or a device is there.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no file that can be replaced. Give another path.")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists. Give another path, or --overwrite to replace it.")


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool = True, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Give a binary file to write; it becomes `path` only if the block ends well.

    What a killed process left of an earlier attempt is removed first. Its mode, at every moment, is `mode` without what
    the umask takes away.

    Raises:
        UsageError: `path` exists and `overwrite` is false, or it is no file, or it cannot be written.
        ResourceError: the disk is full.
    """
    path = Path(path)
    check_file(path, overwrite=overwrite)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(path)
        made = _beside(path, "tmp")
        handle = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        temporary = made
        with os.fdopen(handle, "wb") as file, locked(temporary):
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync(path.parent)
    except OSError as error:
        raise os_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, at every moment; a folder that is made for it, too.

    Raises:
        UsageError: it cannot be written.
        ResourceError: the disk is full.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise os_error(error, path.parent) from error
    with new_file(path, mode=0o600) as file:
        file.write(content)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    with new_file(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path, most: int = 64 << 20) -> Any:
    """Read a JSON file of `most` bytes at most.

    Raises:
        ArtifactError: the file is missing, is no JSON, or larger than any that belongs to a model or run.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ArtifactError(f"{path} is no file.")
        with open(path, "rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ArtifactError(f"{path} is larger than {most >> 20} MiB.")
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error
    return parse_json(content, str(path))


def inside(directory: Path, name: str) -> Path:
    """A path in a directory that may be a stranger's: nothing outside is read because of a link in it.

    Raises:
        ArtifactError: a link leads out of the directory.
    """
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ArtifactError(f"{path} leads out of {directory}, for it is or lies in a link. Put the file itself there.")
    return path


def parse_json(content: str | bytes, source: str) -> Any:
    """The value of a JSON text from outside, all of whose strings are text.

    Args:
        content: The text; UTF-8, with or without a byte order mark.
        source: Where it stands, for the error.

    Raises:
        ArtifactError: it is no JSON, nested too deeply, or holds half a surrogate pair, which is no character.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source} is not valid JSON: {error!s:.300}.") from error


SHAPING = ("fedproxy", "torch", "transformers", "peft", "safetensors", "lm_eval")
"""The packages that shape results."""


def versions() -> dict[str, str]:
    """Versions of `SHAPING`, as far as they are installed."""
    found = {}
    for name in SHAPING:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@dataclass(frozen=True)
class Manifest:
    """`fedproxy.json`: what an artifact is, and which LLM and blocks it belongs to.

    Attributes:
        kind: "proxy", "proxy-adapter" (keys count proxy blocks), "llm-adapter" (keys count LLM blocks) or "fused".
        llm_sha256: `model_identity` of the LLM.
        llm_blocks: Number of blocks of the LLM.
        layer_map: Position = proxy block, value = LLM block, 0-based.
        scores: Score of every LLM block, or none for artifacts that inherit them.
        settings: The settings the artifact was made with.
        seed: The seed it was made with.
        calibration_sha256: SHA-256 of the calibration text, if any.
    """

    kind: str
    llm_sha256: str
    llm_blocks: int
    layer_map: list[int]
    scores: list[float] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    calibration_sha256: str | None = None

    def write(self, directory: Path) -> None:
        """Write `fedproxy.json` into `directory`."""
        record = asdict(self)
        llm = {"sha256": record.pop("llm_sha256"), "blocks": record.pop("llm_blocks")}
        write_json(
            Path(directory) / MANIFEST,
            {"format": FORMAT, "kind": record.pop("kind"), "versions": versions(), "llm": llm, **record},
        )

    @staticmethod
    def read(directory: Path) -> "Manifest":
        """Read and check the `fedproxy.json` of `directory`.

        Raises:
            ArtifactError: it is missing, of another format, or inconsistent.
        """
        path = Path(directory) / MANIFEST
        record = read_json(path, CONFIG_BYTES)

        def need(holds: Callable[[], bool], what: str) -> None:
            try:
                good = holds()
            except (KeyError, TypeError):
                good = False
            if not good:
                raise ArtifactError(f"{path}: {what}.")

        need(lambda: record["format"] == FORMAT, f"format must be {FORMAT}; this file was made by another version")
        need(lambda: isinstance(record["kind"], str), "kind is missing")
        need(lambda: isinstance(record["llm"]["sha256"], str), "llm.sha256 is missing")
        blocks = record["llm"].get("blocks")
        need(lambda: isinstance(blocks, int) and blocks > 0, "llm.blocks must be a positive integer")
        layers = record.get("layer_map")
        need(
            lambda: (
                all(type(i) is int for i in layers)
                and layers == sorted(set(layers))
                and len(layers) > 0
                and layers[0] >= 0
                and layers[-1] < blocks
            ),
            f"layer_map must be a rising list of block numbers below {blocks}",
        )
        need(lambda: isinstance(record.get("settings", {}), dict), "settings must be a table")
        return Manifest(
            kind=record["kind"],
            llm_sha256=record["llm"]["sha256"],
            llm_blocks=blocks,
            layer_map=layers,
            scores=record.get("scores"),
            settings=record.get("settings", {}),
            seed=record.get("seed", 0),
            calibration_sha256=record.get("calibration_sha256"),
        )
