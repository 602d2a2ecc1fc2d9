"""LoRA merged into a checkpoint as a stream: touched tensors are computed piece by piece, all others copied as bytes.

No weight is in memory as a whole: a piece of some rows is read, changed while it lies in the processor's cache, and
written, so that merging is about as fast as copying the files.
"""

import collections
import contextlib
import functools
import itertools
import math
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fedproxy.artifacts import read_json, write_json
from fedproxy.checkpoint_files import CONFIG, Stored, write_order, write_shards
from fedproxy.errors import ArtifactError
from fedproxy.models.checkpoints import copy_tokenizer
from fedproxy.models.lora import check_fits
from fedproxy.models.source import Source
from fedproxy.models.task_vector import Change, LowRank, changed_rows, changes, row_slices

_WORKERS = 4
_AHEAD = 32
"""Pieces, of two megabytes in bfloat16, that may wait to be written."""


def merge_adapter(
    source: Source,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    directory: Path,
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Write a checkpoint with an adapter merged in, as PEFT would merge it, to the bit.

    Sharding and data types are the source's; config.json and the tokenizer's files are copied. Where a trained
    embedding or head no longer is what the other one is, tied weights are written as two tensors, and the configuration
    says so.

    Args:
        source: The model that the adapter is for.
        tensors: The adapter's tensors, named as PEFT names them on the source's text decoder.
        config: Its PEFT configuration.
        directory: Existing directory to write into.
        on_bytes: Told the number of bytes written so far.

    Raises:
        ArtifactError: a tensor does not fit, its weight is stored in another form or in a data type too narrow, a
            result overflows its data type, or a source file cannot be read.
        ResourceError: the disk is too small, or full.
    """
    check_fits(source.decoder, tensors, config)
    directory = Path(directory)
    todo = changes(tensors, config)
    names = stored_names(source)
    shards = [dict(shard) for shard in source.files.shards]
    untied = _untie(source, todo, names, shards)
    work: dict[str, tuple[str, Change]] = {}
    for parameter, change in todo.items():
        if isinstance(change, LowRank) and not bool(change.b.any()):
            continue
        if parameter not in names:
            raise ArtifactError(
                f"{source.path} does not hold {parameter!r} as a tensor of its own, so that nothing can be merged into "
                "it. Fuse to an adapter, or train the adapter without it."
            )
        work[names[parameter]] = (parameter, change)
    order = [(place, shard[place]) for shard in shards for place in write_order(shard) if place in work]
    for place, stored in order:
        if not stored.torch_dtype.is_floating_point or stored.torch_dtype.itemsize < 2:
            raise ArtifactError(
                f"{stored.file} holds {place!r} as {stored.dtype}, which has too few bits to add a task vector to. "
                "Use the LLM in bfloat16, float16 or float32, or fuse to an adapter."
            )
    tasks = (task for place, stored in order for task in _tasks(stored, *work[place]))
    with contextlib.closing(_ahead(tasks)) as pieces:

        def take(stored: Stored) -> Iterator[torch.Tensor]:
            return itertools.islice(pieces, len(row_slices(stored.shape)))

        write_shards(directory, shards, computed=dict.fromkeys(work, take), on_bytes=on_bytes)
    _write_config(source.path / CONFIG, directory / CONFIG, untied)
    copy_tokenizer(source.path, directory, whole=True)


def stored_names(source: Source) -> dict[str, str]:
    """Return under which name the files hold each weight of the text decoder.

    Weights that are held in another form, as the experts of a mixture are, have none. A checkpoint may lack the name of
    the base model, as in "h.0.ln_1.weight" for "transformer.h.0.ln_1.weight".
    """
    shapes = {name: tuple(weight.shape) for name, weight in source.decoder.named_parameters(remove_duplicate=False)}
    theirs, own = parent(source.stored_path), parent(source.blocks_path)
    found = {}
    for place, stored in source.files.tensors.items():
        name = source.decoder_name(place)
        if name is not None and name not in shapes and name.startswith(theirs):
            name = own + name.removeprefix(theirs)
        if name is not None and shapes.get(name) == stored.shape:
            found[name] = place
    return found


def stored_weights(source: Source) -> dict[str, Stored]:
    """Return where the bytes of each weight of the text decoder lie; those of a tied head where the embedding lies."""
    found = {name: source.files.tensors[place] for name, place in stored_names(source).items()}
    ends = tied_ends(source) or {}
    held = [found[name] for name in ends if name in found]
    return dict.fromkeys(ends, held[0]) | found if held else found


def tied_ends(source: Source) -> dict[str, str] | None:
    """Names of embedding and head in the text decoder, with those in the whole model, if they are one weight."""

    def names(model: Any) -> list[str]:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        return [
            f"{next(name for name, m in model.named_modules() if m is end)}.weight" for end in ends if end is not None
        ]

    whole = names(source.whole)
    pairs: Mapping[str, str] = source.whole.all_tied_weights_keys
    if len(whole) < 2 or (pairs.get(whole[1]) != whole[0] and pairs.get(whole[0]) != whole[1]):
        return None
    return dict(zip(names(source.decoder), whole, strict=True))


def parent(path: str) -> str:
    """What comes before the last word of a dotted path, with its dot."""
    return "".join(path.rpartition(".")[:2])


def _untie(source: Source, todo: dict[str, Change], names: dict[str, str], shards: list[dict[str, Stored]]) -> bool:
    """Give embedding and head a place each, if they are tied and no longer the same; tells whether that was needed.

    A new place is added to `names` and `shards`; a head that stays as the embedding is taken out of `todo`.
    """
    ends = tied_ends(source)
    if ends is None or not todo.keys() & ends.keys():
        return False
    held = next(names[name] for name in ends if name in names)
    stored = source.files.tensors[held]
    new = [
        value.to(stored.torch_dtype) if isinstance(value := todo.get(name), torch.Tensor) else stored.read()
        for name in ends
    ]
    missing = [name for name in ends if name not in names]
    if torch.equal(*new):
        for name in missing:
            todo.pop(name, None)
        return False
    shard = next(shard for shard in shards if held in shard)
    for name in missing:
        names[name] = ends[name]
        shard[ends[name]] = stored
    return True


class _Scratch(threading.local):
    """Memory that each thread works in again and again."""

    memory = torch.empty(2, 0)

    def of(self, values: int) -> torch.Tensor:
        if self.memory.shape[1] < values:
            self.memory = torch.empty(2, values)
        return self.memory


_scratch = _Scratch()


def _tasks(stored: Stored, parameter: str, change: Change) -> Iterator[Callable[[], torch.Tensor]]:
    """The pieces of a changed tensor in order, each as a function that makes it."""
    safe = isinstance(change, LowRank) and change.bound < _half_step(stored.torch_dtype)

    def piece(rows: slice) -> torch.Tensor:
        if isinstance(change, LowRank):
            weight = stored.rows(rows.start, rows.stop).read()
            made = changed_rows(weight, change, rows, _scratch.of(weight.numel())).to(stored.torch_dtype, copy=True)
        else:
            made = change[rows].to(stored.torch_dtype)
        if not safe and not bool(torch.isfinite(made).all()):
            raise ArtifactError(
                f"{parameter!r} overflows {stored.torch_dtype} when the task vector is added. Choose a smaller scale."
            )
        return made

    return (functools.partial(piece, rows) for rows in row_slices(stored.shape))


def _ahead(tasks: Iterator[Callable[[], torch.Tensor]]) -> Generator[torch.Tensor, None, None]:
    """Yield what the tasks return, in order; some are worked on while what came before them is written.

    Each runs on one thread: threads within a piece this small would mostly wait for each other.
    """
    pool = ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1), initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting = collections.deque(pool.submit(task) for task in itertools.islice(tasks, _AHEAD))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(pool.submit(task) for task in itertools.islice(tasks, 1))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch.get_num_threads())  # what the workers set holds for threads begun later, too


def _half_step(dtype: torch.dtype) -> float:
    """How much must be added to the largest finite value, at least, to make it infinite."""
    info = torch.finfo(dtype)
    return 2.0 ** (math.frexp(info.max)[1] - 2) * info.eps


def _write_config(source: Path, target: Path, untied: bool) -> None:
    """Copy a configuration to the byte, or with embedding and head declared to be two tensors."""
    if not untied:
        shutil.copyfile(source, target)
        return
    record = read_json(source)
    record["tie_word_embeddings"] = False
    if isinstance(record.get("text_config"), dict):
        record["text_config"]["tie_word_embeddings"] = False
    write_json(target, record)
