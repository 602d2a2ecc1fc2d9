"""Running a rule over updates of any length in bounded memory: measure, select what is kept, combine."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from fedproxy.aggregation.analyse import Analysis, check_updates, describe, measure
from fedproxy.aggregation.merge.kernels import combines, kernels_for
from fedproxy.aggregation.merge.rule import Rule, equal_weights
from fedproxy.aggregation.merge.top_k import kept_count, thresholds, trimmed
from fedproxy.tensors import CHUNK_ELEMENTS, Tensors, outlines

Options = TypeVar("Options")


def drive(
    updates: Sequence[Tensors],
    rule: Rule[Options],
    options: Options,
    *,
    rows: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    levels: Tensors | None = None,
    into: Tensors | None = None,
) -> tuple[Analysis, Iterator[tuple[torch.Tensor, int]]]:
    """Analyse the updates and prepare their merge.

    Args:
        updates: For each client, its update.
        rule: The merge rule.
        options: Its options.
        rows: The clients' numbers of training rows, for rules that weigh by them.
        names: The clients' names.
        chunk_elements: Values held at once.
        levels: Tensors that receive K - |sum of signs| of every coordinate (see `analyse.empty_levels`), if wanted.
        into: Tensors that receive the merged vector as the pieces are asked for, if wanted.

    Returns:
        The analysis, with the weights and the retention of the rule, and the merged vector piece by piece in order, in
        the dtype of each tensor, with the number of zeros (of several pieces, with the first of them).

    Raises:
        UsageError: there is no update, or names or rows do not fit.
        ArtifactError: an update differs from the first in names, shapes or dtypes, or holds NaN or Inf.
    """
    names = check_updates(updates, names)
    kernels = kernels_for(updates)
    statistics = kernels.measure(names, levels) if kernels else measure(updates, names, chunk_elements, levels)
    analysis = describe(statistics, *rule.eq_10(options))
    weighed, retention = rule.weights(analysis, rows, options), list(rule.keep(analysis, options))
    shares = equal_weights(analysis) if weighed is None else weighed
    scales = rule.scale(statistics) if rule.scale else [1.0] * analysis.clients
    keep = [kept_count(share, analysis.parameters) for share in retention]
    analysis = dataclasses.replace(analysis, weights=None if weighed is None else list(weighed), retention=retention)
    if kernels:
        selection = kernels.select(keep)
        if combines(rule.combine, scales):
            return analysis, kernels.combined(rule.combine, selection, shares, scales, options, into)
        limits = selection.thresholds
    else:
        limits = thresholds(updates, keep, chunk_elements)
    device = next(iter(outlines(updates[0]).values())).device
    weights = torch.tensor(shares, dtype=torch.float64, device=device)
    factors = torch.tensor(scales, dtype=torch.float64, device=device)[:, None]

    def pieces() -> Iterator[tuple[torch.Tensor, int]]:
        for spans, values in trimmed(updates, limits, chunk_elements):
            merged = rule.combine(values.double() * factors, weights, options)
            parts = merged.split_with_sizes([span.stop - span.start for span in spans])
            for span, part in zip(spans, parts, strict=True):
                dtype = outlines(updates[0])[span.name].dtype
                piece = part if dtype == torch.float64 else part.float().to(dtype)
                if into is not None:
                    span.of(into).copy_(piece)
                yield piece, piece.numel() - int(piece.count_nonzero())

    return analysis, pieces()
