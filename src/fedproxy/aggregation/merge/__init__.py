"""Merging the clients' updates into one. To add a rule: a file here that ends in a `Rule`, and its row in `RULES`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedproxy.aggregation.analyse import Analysis, check_updates, empty_levels
from fedproxy.aggregation.merge.clipping import CLIP_NORM, clipped
from fedproxy.aggregation.merge.driver import drive
from fedproxy.aggregation.merge.h_ties import H_TIES
from fedproxy.aggregation.merge.mean import MEAN
from fedproxy.aggregation.merge.mean_rescaled import MEAN_RESCALED
from fedproxy.aggregation.merge.median import MEDIAN
from fedproxy.aggregation.merge.rule import Rule
from fedproxy.aggregation.merge.ties import TIES
from fedproxy.aggregation.merge.trimmed_mean import TRIMMED_MEAN
from fedproxy.registry import Axis, build, choose
from fedproxy.tensors import CHUNK_ELEMENTS, Tensors, outlines

__all__ = ["RULES", "Rule", "configured", "merge", "merge_round"]

RULES: Axis[Rule[Any]] = Axis(
    "merge rule",
    "fedproxy.rules",
    Rule,
    {rule.name: rule for rule in (MEAN, MEAN_RESCALED, TIES, H_TIES, MEDIAN, TRIMMED_MEAN)},
)


def configured(name: str, given: Mapping[str, object]) -> tuple[Rule[Any], Any]:
    """The merge rule called `name` and its options, as an experiment gives them.

    Args:
        name: A key of `RULES`.
        given: Options of the rule, and `clip_norm`, which wraps any rule (see `clipping.clipped`); none, it does not.

    Raises:
        UsageError: there is no such rule, an option is unknown, or its value of the wrong type or out of range.
    """
    row = RULES.choose(name)
    known = {field.name: field for field in dataclasses.fields(row.options)} | {CLIP_NORM: None}
    for option in given:
        choose(f"option of the merge rule {name}", option, known)
    options = build("merge rule", name, row.options, {key: value for key, value in given.items() if key != CLIP_NORM})
    limit = given.get(CLIP_NORM)
    return (row if limit is None else clipped(row, limit)), options


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
        chunk_elements: Values held at once where no kernels run; it bounds the memory and does not change the result.
        **options: Options of the rule, and `clip_norm` (see `configured`).

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
    return _merged(updates, rule, None, rows=rows, names=names, chunk_elements=chunk_elements, options=options)


def merge_round(
    updates: Sequence[Tensors],
    rule: str = "h-ties",
    *,
    rows: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    **options: object,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Analysis]:
    """Merge the clients' updates, and say how far they disagree at each coordinate, without a walk more for it.

    Args:
        updates: As of `merge`.
        rule: Name of the merge rule.
        rows: The clients' numbers of training rows.
        names: The clients' names.
        **options: Options of the rule.

    Returns:
        The merged update; K - |sum of signs| of every coordinate as integers (`analyse.conflict_of` makes the conflict
        of Eq. 7 from it); the analysis.

    Raises:
        UsageError: as of `merge`.
        ArtifactError: as of `merge`.
    """
    check_updates(updates, names)
    levels = empty_levels(updates)
    merged, analysis = _merged(updates, rule, levels, rows=rows, names=names, options=options)
    return merged, levels, analysis


def _merged(
    updates: Sequence[Tensors],
    rule: str,
    levels: Tensors | None,
    *,
    rows: Sequence[int] | None,
    names: Sequence[str] | None,
    options: Mapping[str, object],
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[dict[str, torch.Tensor], Analysis]:
    row, chosen = configured(rule, options)
    check_updates(updates, names)
    merged = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in outlines(updates[0]).items()}
    analysis, pieces = drive(
        updates,
        row,
        chosen,
        rows=rows,
        names=names,
        chunk_elements=chunk_elements,
        levels=levels,
        into=merged,
    )
    zeros = sum(count for _, count in pieces)
    return merged, dataclasses.replace(analysis, zero_fraction=zeros / analysis.parameters)
