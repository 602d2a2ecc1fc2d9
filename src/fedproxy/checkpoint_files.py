"""Hugging Face checkpoints as files: where each tensor's bytes lie, who the model is, new shards from old bytes."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fedproxy.artifacts import CONFIG_BYTES, read_json, write_json
from fedproxy.errors import ArtifactError, ResourceError
from fedproxy.tensor_files import DTYPES, header_bytes, read_header, tensor_bytes

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SAMPLE = 64
_INDEX_BYTES = 16 << 20
_COPY_BYTES = 1 << 26
_BUFFER_BYTES = 1 << 23
_SPARE_BYTES = 1 << 20
_NO_RANGES = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""How file systems say that they cannot copy ranges."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NUMBERED = re.compile(r"(?P<path>(?:[^0-9.][^.]*\.)*[^0-9.][^.]*)\.(?P<block>0|[1-9][0-9]{0,5})\.(?P<rest>.+)")


def check_place(path: str | Path) -> None:
    """Check that a checkpoint may be there, without the network.

    Raises:
        ArtifactError: it is a directory without a config.json, or no directory and no Hub id.
    """
    if not Path(path).is_dir() and not _HUB_ID.fullmatch(str(path)):
        raise ArtifactError(f"{path} is no checkpoint: there is no such directory, and it is no Hub id.")
    if Path(path).is_dir() and not (Path(path) / CONFIG).is_file():
        raise ArtifactError(f"{path} is no checkpoint: it holds no {CONFIG}.")


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors shards of a Hugging Face checkpoint, in name order.

    Raises:
        ArtifactError: there is no checkpoint, or its index names files that are missing or lie elsewhere.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / CONFIG).is_file():
        raise ArtifactError(f"{checkpoint} is no Hugging Face checkpoint: {CONFIG} is missing.")
    files = [checkpoint / name for name in weight_names(checkpoint)]
    if lost := [file.name for file in files if not file.is_file()]:
        raise ArtifactError(
            f"{checkpoint / INDEX} names the shard {lost[0]!r}, which is not in {checkpoint}."
            if (checkpoint / INDEX).is_file()
            else f"{checkpoint} holds no {SINGLE}. Convert other weight formats with transformers' save_pretrained."
        )
    return files


def weight_names(checkpoint: Path) -> list[str]:
    """The names that the weight files of a checkpoint have, whether they are there or not, in order.

    Raises:
        ArtifactError: its index names files that lie elsewhere, or none.
    """
    index = checkpoint / INDEX
    if (checkpoint / SINGLE).is_file() or not index.is_file():
        return [SINGLE]
    record = read_json(index, _INDEX_BYTES)
    found = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(found, dict) or not found:
        raise ArtifactError(f"{index} has no weight_map of tensor names to file names.")
    for name in found.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ArtifactError(f"{index} names the shard {name!r}, which is not in {checkpoint}.")
    return sorted(set(found.values()))


@dataclass(frozen=True)
class Stored:
    """Where the bytes of a tensor lie.

    Attributes:
        file: The safetensors file.
        dtype: The safetensors dtype name.
        shape: The tensor's shape.
        begin: First byte in the file.
        end: One past the last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> torch.Tensor:
        """Read the tensor into memory of its own.

        Raises:
            ArtifactError: the file cannot be read, or its dtype is unknown to torch.
        """
        tensor = torch.empty(self.shape, dtype=self.torch_dtype)
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.begin)
                view, position = tensor_bytes(tensor), 0
                while position < len(view):
                    count = file.readinto(view[position : position + _COPY_BYTES])
                    if not count:
                        raise ArtifactError(f"{self.file} ends early: it was changed while it was read.")
                    position += count
        except OSError as error:
            raise ArtifactError(f"{self.file}: {error.strerror or error}.") from error
        return tensor

    def rows(self, begin: int, end: int) -> "Stored":
        """Where some of its rows lie."""
        row = (self.end - self.begin) // self.shape[0]
        shape = (end - begin, *self.shape[1:])
        return replace(self, shape=shape, begin=self.begin + begin * row, end=self.begin + end * row)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch's terms."""
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's configuration and the place of every tensor; no weight is read.

    Attributes:
        path: Its directory.
        config: config.json.
        shards: For each weight file in name order, its tensors.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[dict[str, Stored], ...]

    @property
    def tensors(self) -> dict[str, Stored]:
        """Every tensor by name."""
        return {name: stored for shard in self.shards for name, stored in shard.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The first floating-point dtype of the tensors that torch can compute in; float32 if there is none."""
        dtypes = (stored.torch_dtype for stored in self.tensors.values())
        return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(stored.end - stored.begin for shard in self.shards for stored in shard.values())


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's configuration and headers; what the shards hold counts, not what the index says of it.

    Raises:
        ArtifactError: there is no checkpoint, a header is invalid, or a tensor lies in two shards.
    """
    path = Path(path)
    files = weight_files(path)
    config = read_json(path / CONFIG, CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ArtifactError(f"{path / CONFIG} must hold a JSON object.")
    shards = [{name: Stored(file, *entry) for name, entry in read_header(file).entries.items()} for file in files]
    names: dict[str, Path] = {}
    for shard in shards:
        for name, stored in shard.items():
            if name in names:
                raise ArtifactError(f"{path}: the tensor {name!r} lies in {names[name].name} and {stored.file.name}.")
            names[name] = stored.file
    return Checkpoint(path, config, tuple(shards))


def split_number(name: str) -> tuple[str, int, str] | None:
    """Split a tensor's name at its first number into path, number and rest; none if it has no number.

    Example:
        >>> split_number("model.layers.3.mlp.experts.7.w1.weight")
        ('model.layers', 3, 'mlp.experts.7.w1.weight')
    """
    match = _NUMBERED.fullmatch(name)
    return None if match is None else (match["path"], int(match["block"]), match["rest"])


def numbered_lists(names: Iterable[str]) -> dict[str, set[int]]:
    """Return the lists that tensor names count through: path → the numbers that occur under it."""
    lists: dict[str, set[int]] = {}
    for name in names:
        parts = split_number(name)
        if parts is not None:
            lists.setdefault(parts[0], set()).add(parts[1])
    return lists


def model_identity(checkpoint: Path) -> str:
    """SHA-256 over a checkpoint's configuration, tensor index (names, dtypes, shapes) and a sample of every tensor.

    The sample (first, middle and last 64 bytes) tells a model from another one of the same shape, a fine-tuned twin
    for example, without reading the weights. It does not depend on how the tensors are spread over files.

    Raises:
        ArtifactError: there is no checkpoint.
    """
    found = open_checkpoint(Path(checkpoint))
    index: dict[str, Any] = {}
    for shard in filter(None, found.shards):
        with open(next(iter(shard.values())).file, "rb", buffering=0) as file:
            for name, stored in shard.items():
                sample = hashlib.sha256()
                for start in (stored.begin, (stored.begin + stored.end) // 2, max(stored.begin, stored.end - _SAMPLE)):
                    file.seek(start)
                    sample.update(file.read(min(_SAMPLE, stored.end - start)))
                index[name] = [stored.dtype, list(stored.shape), sample.hexdigest()]
    config = dict(found.config)
    for volatile in ("transformers_version", "_name_or_path"):
        config.pop(volatile, None)
    return hashlib.sha256(json.dumps([config, index], sort_keys=True).encode()).hexdigest()


def require_space(directory: Path, needed: int) -> None:
    """Check that the disk of `directory` has room for `needed` bytes and a little more.

    Raises:
        ResourceError: it has not.
    """
    free = shutil.disk_usage(directory).free
    if needed + _SPARE_BYTES > free:
        raise ResourceError(
            f"{directory}: {needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB of disk space are free. "
            "Free some space, or write to another disk."
        )


Compute = Callable[[Stored], torch.Tensor | Iterable[torch.Tensor]]
"""Makes the new tensor from where the old one lies: as a whole, or in pieces of its flattened values."""


def write_shards(
    directory: Path,
    shards: Sequence[Mapping[str, Stored]],
    *,
    computed: Mapping[str, Compute] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Write the weight files of a checkpoint: every tensor copied as bytes, those of `computed` made anew.

    One shard becomes `model.safetensors`, several become numbered shards with their index. Within a file tensors lie
    as safetensors itself orders them (by dtype, then by name), so that the same tensors give the same bytes as
    transformers' `save_pretrained`. A computed tensor has the dtype and shape of the one it replaces.

    Args:
        directory: Directory of `artifacts.new_directory`, which syncs what is written here and removes what fails.
        shards: For each file to write, name → where the bytes lie; empty ones are left out.
        computed: Name → function that makes the new tensor from where the old one lies, as a whole or in pieces that
            are written as they come; called when it is its turn.
        on_bytes: Told the number of bytes written so far.

    Raises:
        ArtifactError: a source file cannot be read.
        ResourceError: the disk is too small, or full.
    """
    shards = [shard for shard in shards if shard]
    total = sum(stored.end - stored.begin for shard in shards for stored in shard.values())
    require_space(directory, total)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    copier, done = ThreadPoolExecutor(1), 0
    try:
        for file_name, shard in zip(names, shards, strict=True):
            for written in _write_shard(directory / file_name, shard, computed or {}, copier):
                done += written
                if on_bytes is not None:
                    on_bytes(done)
    finally:
        copier.shutdown(cancel_futures=True)
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def replace_weights(checkpoint: Path, made: Path) -> None:
    """Put the weight files of `made`, a directory on the same disk, in place of a checkpoint's; `made` is gone then."""
    for old in [*weight_files(checkpoint), checkpoint / INDEX]:
        old.unlink(missing_ok=True)
    for new in made.glob("*.safetensors*"):
        shutil.move(new, checkpoint / new.name)
    shutil.rmtree(made)


def _write_shard(
    path: Path, shard: Mapping[str, Stored], computed: Mapping[str, Compute], copier: Executor
) -> Iterator[int]:
    """Write one file: `copier` copies what is copied while the computed tensors are made; yields the bytes written."""
    order = write_order(shard)
    header = header_bytes({name: (shard[name].dtype, shard[name].shape) for name in order})
    position, copies = len(header), []
    with open(path, "wb") as file:
        file.write(header)
        file.flush()
        try:
            for run in _runs(order, shard, computed):
                if isinstance(run, Stored):
                    for begin in range(run.begin, run.end, _COPY_BYTES):
                        piece = replace(run, begin=begin, end=min(begin + _COPY_BYTES, run.end))
                        copies.append(copier.submit(_copy_bytes, piece, file.fileno(), position + begin - run.begin))
                    position += run.end - run.begin
                else:
                    file.seek(position)
                    written = _write_made(run, shard[run], computed[run](shard[run]), file)
                    position += written
                    yield written
            for copy in copies:
                yield copy.result()
        finally:
            for copy in copies:
                copy.cancel()
            wait(copies)  # nobody may write once the file is closed


def write_order(shard: Mapping[str, Stored]) -> list[str]:
    """The order in which `write_shards` writes the tensors of a file: by dtype, then by name."""
    layout = list(DTYPES)
    return sorted(shard, key=lambda name: (layout.index(shard[name].dtype), name))


def _write_made(name: str, stored: Stored, made: torch.Tensor | Iterable[torch.Tensor], target: BinaryIO) -> int:
    """Write a computed tensor in place of `stored`; returns its bytes."""
    written = 0
    for piece in (made,) if isinstance(made, torch.Tensor) else made:
        if piece.dtype != stored.torch_dtype:
            raise AssertionError(f"{name} was computed as {piece.dtype}, not {stored.dtype}")
        written += target.write(tensor_bytes(piece))
    if written != stored.end - stored.begin:
        raise AssertionError(f"{name} was computed as {written} bytes, not {stored.end - stored.begin}")
    target.flush()
    return written


def _runs(order: Sequence[str], shard: Mapping[str, Stored], computed: Mapping[str, Compute]) -> list[str | Stored]:
    """What to write, in order: names of computed tensors, and stretches of a file that are copied in one go."""
    runs: list[str | Stored] = []
    for name in order:
        stored, last = shard[name], runs[-1] if runs else None
        if name in computed:
            runs.append(name)
        elif isinstance(last, Stored) and last.file == stored.file and last.end == stored.begin:
            runs[-1] = Stored(stored.file, stored.dtype, (), last.begin, stored.end)
        elif stored.end > stored.begin:
            runs.append(Stored(stored.file, stored.dtype, (), stored.begin, stored.end))
    return runs


def _copy_bytes(source: Stored, target: int, position: int) -> int:
    """Copy a stretch of a file into the file `target`, within the kernel where it can; returns its bytes."""
    begin = source.begin
    copy: Callable[[int, int, int, int, int], int] = os.copy_file_range
    with open(source.file, "rb", buffering=0) as file:
        while begin < source.end:
            try:
                count = copy(file.fileno(), target, source.end - begin, begin, position)
            except OSError as error:
                if copy is _copy_through or error.errno not in _NO_RANGES:
                    raise
                copy = _copy_through
                continue
            if count == 0:
                raise ArtifactError(f"{source.file} ends early: it was changed while it was copied.")
            begin, position = begin + count, position + count
    return source.end - source.begin


def _copy_through(source: int, target: int, count: int, begin: int, position: int) -> int:
    return os.pwrite(target, os.pread(source, min(count, _BUFFER_BYTES), begin), position)
