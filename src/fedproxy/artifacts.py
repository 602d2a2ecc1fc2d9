"""What lies on disk: safetensors and JSON, written to a temporary name, synced, then renamed.

Nothing here trusts a file: a safetensors header is checked before a tensor is touched, JSON is parsed
strictly, and every failure is an `ArtifactError` that names the file.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedproxy.errors import ArtifactError, FedproxyError, ResourceError, UsageError

FORMAT = 1
MANIFEST = "fedproxy.json"
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def os_error(error: OSError, path: Path) -> FedproxyError:
    """Translate an operating-system error at `path` into ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        return ResourceError(f"{path}: {error.strerror}. Free some space and run the command again.")
    return UsageError(f"{path}: cannot write ({error.strerror or error}). Choose a path that can be written.")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary sibling of `path` to fill; it becomes `path` only if the block ends well.

    Raises:
        UsageError: `path` exists and `overwrite` is false, or its parent cannot be written.
        ResourceError: the disk is full.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists. Give another path, or --overwrite to replace it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    except OSError as error:
        raise os_error(error, path) from error
    try:
        temporary.chmod(0o755)
        yield temporary
        for item in sorted(temporary.rglob("*")):
            _sync(item)
        _sync(temporary)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
            path.rename(old / "old")
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise os_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Give a binary file to write; it becomes `path` only if the block ends well.

    Raises:
        UsageError: `path` exists and `overwrite` is false, or it cannot be written.
        ResourceError: the disk is full.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists. Give another path, or --overwrite to replace it.")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
        temporary = Path(name)
        temporary.chmod(0o644)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise os_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    with new_file(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: the file is missing or is no JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}.") from error


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file: where each tensor lies, checked against the file's length.

    Attributes:
        path: The file.
        entries: For each tensor, its safetensors dtype name, shape, and byte range in the file.
        metadata: The header's string metadata.
    """

    path: Path
    entries: dict[str, tuple[str, tuple[int, ...], int, int]]
    metadata: dict[str, str]


_DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_DTYPE_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def read_header(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file; no tensor is touched.

    Raises:
        ArtifactError: the file is missing, truncated, or its header does not describe its bytes exactly.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(size - 8, 100_000_000):
                raise ArtifactError(f"{path} is not a safetensors file, or is truncated.")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        metadata = header.pop("__metadata__", {})
        entries = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            count = 1
            for extent in shape:
                if not isinstance(extent, int) or extent < 0:
                    raise ValueError(f"{name} has shape {shape}")
                count *= extent
            if end - begin != count * _DTYPE_BYTES[entry["dtype"]]:
                raise ValueError(f"{name} has {end - begin} bytes for shape {shape} of {entry['dtype']}")
            entries[name] = (entry["dtype"], shape, 8 + length + begin, 8 + length + end)
        position = 8 + length
        for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
            if begin != position:
                raise ValueError(f"{name} overlaps another tensor or leaves a gap")
            position = end
        if position != size:
            raise ValueError(f"it describes {position} bytes, the file has {size}: truncated or padded")
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: the safetensors header is invalid: {error}.") from error
    return TensorFile(path, entries, metadata)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Load every tensor of a safetensors file.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: {error}.") from error


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if flat.numel() else b"")  # type: ignore[arg-type]


def write_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    chunks: Iterable[torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = True,
) -> None:
    """Write a safetensors file from a stream of chunks, so that no whole tensor need be in memory.

    The same layout and values give the same bytes.

    Args:
        path: The file.
        layout: Name → (dtype, shape); the tensors are written in sorted name order.
        chunks: Pieces of the tensors' flattened values, in that order, of any length.
        metadata: String metadata for the header.
        overwrite: Replace an existing file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name in sorted(layout):
        dtype, shape = layout[name]
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path, overwrite=overwrite) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for chunk in chunks:
            file.write(tensor_bytes(chunk))
        if file.tell() != 8 + len(text) + position:
            raise AssertionError(f"{path}: {file.tell()} bytes written, {8 + len(text) + position} announced")


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as one safetensors file, atomically; the same tensors give the same bytes."""
    write_tensors(
        path,
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
        (tensors[name].detach().cpu() for name in sorted(tensors)),
        metadata=metadata,
    )


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors shards of a Hugging Face checkpoint, in name order.

    Raises:
        ArtifactError: there is no checkpoint, or its index names files that are missing or lie elsewhere.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / "config.json").is_file():
        raise ArtifactError(f"{checkpoint} is no Hugging Face checkpoint: config.json is missing.")
    single, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ArtifactError(
            f"{checkpoint} holds no model.safetensors. Convert other weight formats with transformers' save_pretrained."
        )
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{index} has no weight_map.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (checkpoint / name).is_file():
            raise ArtifactError(f"{index} names the shard {name!r}, which is not in {checkpoint}.")
    return [checkpoint / name for name in names]


_SAMPLE = 64


def model_identity(checkpoint: Path) -> str:
    """SHA-256 over a checkpoint's configuration, tensor index (names, dtypes, shapes) and a sample of every tensor.

    The sample (first, middle and last 64 bytes) tells a model from another one of the same shape, a fine-tuned twin
    for example, without reading the weights. It does not depend on how the tensors are spread over files.

    Raises:
        ArtifactError: there is no checkpoint.
    """
    index: dict[str, Any] = {}
    for path in weight_files(checkpoint):
        with open(path, "rb") as file:
            for name, (dtype, shape, begin, end) in read_header(path).entries.items():
                sample = hashlib.sha256()
                for start in (begin, (begin + end) // 2, max(begin, end - _SAMPLE)):
                    file.seek(start)
                    sample.update(file.read(min(_SAMPLE, end - start)))
                index[name] = [dtype, list(shape), sample.hexdigest()]
    config = read_json(Path(checkpoint) / "config.json")
    for volatile in ("transformers_version", "_name_or_path"):
        config.pop(volatile, None)
    return hashlib.sha256(json.dumps([config, index], sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of fedproxy and of the libraries that shape its results."""
    found = {}
    for name in ("fedproxy", "torch", "transformers", "peft", "safetensors", "lm_eval"):
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
        record = read_json(path)

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
