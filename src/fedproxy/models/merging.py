"""LoRA merged into a checkpoint as a stream: touched tensors are computed piece by piece, all others copied as bytes.

No weight is in memory as a whole: a piece of some rows is read, changed while it lies in the processor's cache, and
written, so that merging is about as fast as copying the files.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedproxy.artifacts import read_json, write_json
from fedproxy.checkpoint_files import CONFIG, Compute, Stored, write_shards
from fedproxy.errors import ArtifactError
from fedproxy.models.adapter_checks import check_fits
from fedproxy.models.checkpoints import Model, copy_tokenizer
from fedproxy.models.source import Source
from fedproxy.models.task_vector import Change, LowRank, changes, row_slices, row_sums


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
        on_bytes: Told the number of bytes written since the last call.

    Raises:
        ArtifactError: a tensor does not fit, its weight is stored in another form or in a data type too narrow, a
            result overflows its data type, or a source file cannot be read.
        ResourceError: the disk is too small, or full.
    """
    check_fits(source.decoder, tensors, config)
    directory = Path(directory)
    todo = changes(tensors, config)
    names, files = stored_names(source), source.files.tensors
    shards = [dict(shard) for shard in source.files.shards]
    untied = _untie(source, todo, names, shards)
    computed: dict[str, Compute] = {}
    for parameter, change in todo.items():
        if isinstance(change, LowRank) and not bool(change.b.any()):
            continue
        place = names.get(parameter)
        if place is None:
            raise ArtifactError(
                f"{source.path} does not hold {parameter!r} as a tensor of its own, so that nothing can be merged into "
                "it. Fuse to an adapter, or train the adapter without it."
            )
        computed[place] = _compute(parameter, change)
    for place in computed:
        stored = files.get(place) or next(shard[place] for shard in shards if place in shard)
        if not stored.torch_dtype.is_floating_point or stored.torch_dtype.itemsize < 2:
            raise ArtifactError(
                f"{stored.file} holds {place!r} as {stored.dtype}, which has too few bits to add a task vector to. "
                "Use the LLM in bfloat16, float16 or float32, or fuse to an adapter."
            )
    write_shards(directory, shards, computed=computed, on_bytes=on_bytes)
    _write_config(source.path / CONFIG, directory / CONFIG, untied)
    copy_tokenizer(source.path, directory)


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
    names, weights = stored_names(source), dict(source.decoder.named_parameters(remove_duplicate=False))
    places = {id(weights[name]): source.files.tensors[place] for name, place in names.items()}
    own = {name: source.files.tensors[place] for name, place in names.items()}
    return {name: places[id(weight)] for name, weight in weights.items() if id(weight) in places} | own


def parent(path: str) -> str:
    """What comes before the last word of a dotted path, with its dot."""
    return "".join(path.rpartition(".")[:2])


def _untie(source: Source, todo: dict[str, Change], names: dict[str, str], shards: list[dict[str, Stored]]) -> bool:
    """Give embedding and head a place each, if they are tied and no longer the same; tells whether that was needed.

    Args:
        source: The model.
        todo: What is done to its weights; a head that stays as the embedding is taken out.
        names: Under which name the files hold each weight; a new place is added.
        shards: What to write; a new place is added.
    """
    whole: Any = source.whole
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    if embedding is None or head is None or embedding.weight is not head.weight:
        return False
    decoder: Any = source.decoder
    ends = [
        f"{_module_name(decoder, module)}.weight"
        for module in (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    ]
    if not todo.keys() & set(ends):
        return False
    held = next(names[name] for name in ends if name in names)
    stored = source.files.tensors[held]
    new = [
        value.to(stored.torch_dtype) if isinstance(value := todo.get(name), torch.Tensor) else stored.read()
        for name in ends
    ]
    places = {name: _module_name(whole, module) for name, module in zip(ends, (embedding, head), strict=True)}
    missing = [name for name in places if name not in names]
    if torch.equal(*new):
        for name in missing:
            todo.pop(name, None)
        return False
    shard = next(shard for shard in shards if held in shard)
    for name in missing:
        names[name] = f"{places[name]}.weight"
        shard[names[name]] = stored
    return True


def _module_name(model: Model, wanted: object) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def _compute(parameter: str, change: Change) -> Compute:
    """The pieces of a changed tensor, checked."""

    def pieces(stored: Stored) -> Iterator[torch.Tensor]:
        if isinstance(change, LowRank):
            values: Iterable[tuple[slice, torch.Tensor]] = row_sums(
                stored.shape, lambda rows: _rows(stored, rows), change
            )
        else:
            values = ((rows, change[rows].float()) for rows in row_slices(stored.shape))
        safe = isinstance(change, LowRank) and change.bound < _half_step(stored.torch_dtype)
        narrow: torch.Tensor | None = None
        for _, wide in values:
            if narrow is None:
                narrow = torch.empty(wide.shape, dtype=stored.torch_dtype)
            piece = narrow.resize_(wide.shape).copy_(wide)
            if not safe and not bool(torch.isfinite(piece).all()):
                raise ArtifactError(
                    f"{parameter!r} overflows {stored.torch_dtype} when the task vector is added. "
                    "Choose a smaller scale."
                )
            yield piece

    return pieces


def _half_step(dtype: torch.dtype) -> float:
    """How much must be added to the largest finite value, at least, to make it infinite."""
    info = torch.finfo(dtype)
    return 2.0 ** (math.frexp(info.max)[1] - 2) * info.eps


def _rows(stored: Stored, rows: slice) -> torch.Tensor:
    """Read some rows of a stored matrix."""
    row = (stored.end - stored.begin) // stored.shape[0]
    shape = (rows.stop - rows.start, *stored.shape[1:])
    return replace(
        stored, shape=shape, begin=stored.begin + rows.start * row, end=stored.begin + rows.stop * row
    ).read()


def _write_config(source: Path, target: Path, untied: bool) -> None:
    """Copy a configuration to the byte, or with embedding and head declared to be two tensors."""
    if not untied:
        shutil.copyfile(source, target)
        target.chmod(0o644)
        return
    record = read_json(source)
    record["tie_word_embeddings"] = False
    if isinstance(record.get("text_config"), dict):
        record["text_config"]["tie_word_embeddings"] = False
    write_json(target, record)
