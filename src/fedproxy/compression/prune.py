"""The proxy as a checkpoint of its own: kept tensors are copied as bytes under new names, and then put to the proof."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedproxy.artifacts import write_json
from fedproxy.checkpoint_files import CONFIG, split_number, write_shards
from fedproxy.errors import ArtifactError
from fedproxy.layer_map import check_layer_map
from fedproxy.models.block_stream import BlockStream
from fedproxy.models.checkpoints import Model, copy_tokenizer
from fedproxy.models.families import per_block_lists
from fedproxy.models.loading import restored
from fedproxy.models.source import Source, open_source
from fedproxy.side_files import cleaned

_PROBE_TOKENS = 4


def prune(
    source: Source, keep: Sequence[int], directory: Path, *, on_bytes: Callable[[int], None] | None = None
) -> None:
    """Write a checkpoint of the kept blocks and of all that is outside the blocks; no weight is decoded.

    Shards stay shards and data types stay what they are. Of a multimodal model the text decoder alone is written.
    `on_bytes` is told the number of bytes written so far.

    Raises:
        UsageError: `keep` is no rising list of the model's blocks.
        ArtifactError: the LLM's files cannot be read.
        ResourceError: the disk is too small, or full.
    """
    check_layer_map(keep, source.count)
    renamed = ({_new_name(source, name, keep): stored for name, stored in s.items()} for s in source.files.shards)
    write_shards(
        directory, [{name: s for name, s in shard.items() if name is not None} for shard in renamed], on_bytes=on_bytes
    )
    write_json(directory / CONFIG, pruned_config(source, keep))
    copy_tokenizer(source.path, directory)
    if source.trust_remote_code:
        for file in filter(Path.is_file, source.path.glob("*.py")):
            shutil.copyfile(file, directory / file.name)


def _new_name(source: Source, stored_name: str, keep: Sequence[int]) -> str | None:
    name = source.decoder_name(stored_name)
    block = None if name is None else source.block_of(name)
    if name is None or block is None:
        return name
    if block not in keep:
        return None
    path, _, rest = split_number(name) or ("", 0, "")
    return f"{path}.{keep.index(block)}.{rest}"


def pruned_config(source: Source, keep: Sequence[int]) -> dict[str, Any]:
    """Return config.json of the proxy: what may leave of the LLM's, its own number of blocks, per-block lists sliced.

    Lists that the LLM's config.json leaves to be derived from a block's number (sliding windows every other block, for
    example) are written out, because the proxy's numbers would give others.
    """
    config = source.decoder.config
    record = dict(source.files.config)
    if source.multimodal:
        record = {**config.to_dict(), "architectures": [type(source.decoder).__name__]}
    for name in per_block_lists(config, source.count):
        record[name] = [getattr(config, name)[block] for block in keep]
    record[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(keep)
    return cleaned(CONFIG, record)


def check_proxy(source: Source, keep: Sequence[int], made: Path | Model) -> None:
    """Check that each block of a proxy computes what the same block of the LLM computes, one at a time.

    Raises:
        ArtifactError: what a block computes depends on its position, so that it cannot be moved.
    """
    if not isinstance(made, Path):
        _compare(BlockStream(source.decoder), BlockStream(made), keep)
        return
    llm = open_source(source.path, trust_remote_code=source.trust_remote_code)
    try:
        written = open_source(made, trust_remote_code=source.trust_remote_code)
    except ArtifactError as error:
        raise ArtifactError(
            f"{source.path} cannot be compressed: what a block is made of depends on its position ({error})"
        ) from error
    _compare(BlockStream(llm.decoder, llm), BlockStream(written.decoder, written), keep)


def _compare(whole: BlockStream, proxy: BlockStream, keep: Sequence[int]) -> None:
    tokens = torch.arange(_PROBE_TOKENS)[None]
    before, after = (stream.enter(tokens, torch.ones_like(tokens)) for stream in (whole, proxy))
    for number, block in proxy.walk(read_ahead=False):
        same = whole.blocks[keep[number]]
        with restored(same):
            if any(weight.is_meta for weight in same.parameters()):  # then it computes with the proxy's
                for path, module in same.named_modules():
                    module._parameters.update(block.get_submodule(path)._parameters)
            expected, found = whole.run(keep[number], before), proxy.run(number, after)
        tolerance = 8 * torch.finfo(found.dtype).eps * float(expected.abs().max())
        if not torch.allclose(found.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True):
            raise ArtifactError(
                f"{type(whole.model).__name__} cannot be compressed: as block {number} of the proxy, block "
                f"{keep[number]} of the LLM computes something else (by {float((found - expected).abs().max()):.2g}), "
                "so what a block computes depends on its position."
            )
        before.hidden = after.hidden = expected
