"""Merging the clients' updates into one. To add a rule: a file here that ends in a `Rule`, and its row in `RULES`."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedproxy.errors import UsageError
from fedproxy.federation.analyse import Analysis, conflict_pieces
from fedproxy.federation.choice import choose
from fedproxy.federation.merge.driver import drive
from fedproxy.federation.merge.h_ties import H_TIES
from fedproxy.federation.merge.mean import MEAN
from fedproxy.federation.merge.rule import Rule, build_options
from fedproxy.federation.merge.ties import TIES
from fedproxy.tensor_files import read_header, write_tensors
from fedproxy.tensors import CHUNK_ELEMENTS, MappedTensors, Tensors

__all__ = ["RULES", "Rule", "build_options", "merge", "merge_files", "merge_rule"]

RULES: dict[str, Rule[Any]] = {rule.name: rule for rule in (MEAN, TIES, H_TIES)}


def merge_rule(name: str) -> Rule[Any]:
    """The merge rule called `name`.

    Raises:
        UsageError: there is no such rule.
    """
    return choose("merge rule", name, RULES)


def merge(
    updates: Sequence[Tensors],
    rule: str = "h-ties",
    *,
    rows: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    **options: object,
) -> tuple[dict[str, torch.Tensor], Analysis]:
    """Merge the clients' updates.

    Args:
        updates: For each client, its trained minus the global parameters; the same names, shapes and dtypes.
        rule: Name of the merge rule, a key of `RULES`.
        rows: The clients' numbers of training rows; `mean` weighs by them, other rules do not look.
        names: The clients' names, for the analysis and for errors.
        chunk_elements: Values held at once; it bounds the memory and does not change the result.
        **options: Options of the rule.

    Returns:
        The merged update, with the names, shapes and dtypes of the given ones, and the analysis.

    Raises:
        UsageError: there is no update or rule of that name, an option is wrong, or names or rows do not fit.
        ArtifactError: an update differs from the first in names, shapes or dtypes, or holds NaN or Inf.

    Example:
        >>> merged, analysis = merge([{"w": torch.tensor([1.0, 4.0])}, {"w": torch.tensor([3.0, -1.0])}], "h-ties")
        >>> merged["w"].tolist()
        [2.0, 4.0]
    """
    row = merge_rule(rule)
    analysis, pieces = drive(
        updates, row, build_options(row, options), rows=rows, names=names, chunk_elements=chunk_elements
    )
    merged = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in updates[0].items()}
    zeros = 0
    for span, piece in pieces:
        zeros += _zeros(piece)
        span.of(merged).copy_(piece)
    return merged, dataclasses.replace(analysis, zero_fraction=zeros / analysis.parameters)


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
        rows: The clients' numbers of training rows.
        names: The clients' names; the file names without them.
        **options: Options of the rule.

    Returns:
        The analysis.

    Raises:
        UsageError: as of `merge`; or an output exists or cannot be written.
        ArtifactError: as of `merge`; or a file is missing or damaged.
        ResourceError: the disk is full.
    """
    row = merge_rule(rule)
    chosen = build_options(row, options)
    outputs = [Path(path) for path in (out, conflict_out) if path is not None]
    if len({path.absolute() for path in outputs}) < len(outputs):
        raise UsageError(f"{out}: the merged update and the conflict cannot go to the same file.")
    for path in outputs:
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists. Give another path, or --overwrite to replace it.")
    updates = [MappedTensors(path, read_header(path).entries) for path in paths]
    analysis, pieces = drive(
        updates, row, chosen, rows=rows, names=[str(path) for path in paths] if names is None else names
    )
    zeros = 0

    def counted() -> Iterator[torch.Tensor]:
        nonlocal zeros
        for _, piece in pieces:
            zeros += _zeros(piece)
            yield piece

    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in updates[0].items()}
    write_tensors(outputs[0], layout, counted(), overwrite=overwrite)
    if conflict_out is not None:
        layout = {name: (torch.float32, shape) for name, (_, shape) in layout.items()}
        write_tensors(outputs[1], layout, (piece for _, piece in conflict_pieces(updates)), overwrite=overwrite)
    return dataclasses.replace(analysis, zero_fraction=zeros / analysis.parameters)


def _zeros(piece: torch.Tensor) -> int:
    return piece.numel() - int(piece.count_nonzero())
