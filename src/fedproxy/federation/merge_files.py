"""Merging updates that lie in files, streaming from file to file."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fedproxy.aggregation.analyse import Analysis, check_updates, empty_levels
from fedproxy.aggregation.merge import configured
from fedproxy.aggregation.merge.driver import drive
from fedproxy.artifacts import check_file, check_spared
from fedproxy.errors import UsageError
from fedproxy.tensor_files import read_header, write_tensors
from fedproxy.tensors import CHUNK_ELEMENTS, MappedTensors, chunks


def merge_files(
    paths: Sequence[Path],
    out: Path,
    rule: str = "h-ties",
    conflict_out: Path | None = None,
    *,
    overwrite: bool = False,
    rows: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    **options: object,
) -> Analysis:
    """Merge updates that lie in safetensors files, streaming from file to file.

    Args:
        paths: One file a client.
        out: The merged update, written atomically.
        rule: Name of the merge rule.
        conflict_out: Where to write the conflict of every coordinate (Eq. 7, float32), if anywhere.
        overwrite: Replace existing files.
        rows: The clients' numbers of training rows, for a rule that weighs by them.
        names: The clients' names; the file names without them.
        **options: Options of the rule, and `clip_norm` (see `configured`).

    Returns:
        The analysis.

    Raises:
        UsageError: as of `merge`; or rows are given to a rule that does not weigh by them; or an output exists, cannot
            be written, or is one of the updates.
        ArtifactError: as of `merge`; or a file is missing or damaged.
        ResourceError: the disk is full.

    Example:
        `merge_files([Path("bank.safetensors"), Path("shop.safetensors")], Path("merged.safetensors")).weights`
    """
    row, chosen = configured(rule, options)
    if rows is not None and not row.by_rows(chosen):
        raise UsageError(
            f"rows are given, but {rule} as it is set does not weigh by them. Leave them out, or take another rule or "
            "weights=rows."
        )
    outputs = [Path(path) for path in (out, conflict_out) if path is not None]
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise UsageError(f"{out}: the merged update and the conflict cannot go to the same file.")
    for path in outputs:
        check_spared(path, paths)
        check_file(path, overwrite=overwrite)
    updates = [MappedTensors(path, read_header(path).entries) for path in paths]
    given = [str(path) for path in paths] if names is None else names
    check_updates(updates, given)
    levels = None if conflict_out is None else empty_levels(updates)
    analysis, pieces = drive(updates, row, chosen, rows=rows, names=given, levels=levels)
    zeros = 0

    def counted() -> Iterator[torch.Tensor]:
        nonlocal zeros
        for piece, count in pieces:
            zeros += count
            yield piece

    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in updates[0].items()}
    write_tensors(outputs[0], layout, counted(), overwrite=overwrite)
    if levels is not None:
        layout = {name: (torch.float32, shape) for name, (_, shape) in layout.items()}
        spans = (span for some in chunks(levels, CHUNK_ELEMENTS) for span in some)
        write_tensors(
            outputs[1], layout, (span.of(levels).float() / len(updates) for span in spans), overwrite=overwrite
        )
    return dataclasses.replace(analysis, zero_fraction=zeros / analysis.parameters)
