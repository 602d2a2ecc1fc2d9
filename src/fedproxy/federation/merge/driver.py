"""Running a rule over updates of any length in bounded memory: measure, select what is kept, combine."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from fedproxy.federation.analyse import Analysis, measure
from fedproxy.federation.merge.rule import Rule
from fedproxy.federation.merge.top_k import kept_count, thresholds, trimmed
from fedproxy.tensors import CHUNK_ELEMENTS, Span, Tensors

Options = TypeVar("Options")


def drive(
    updates: Sequence[Tensors],
    rule: Rule[Options],
    options: Options,
    *,
    rows: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Analysis, Iterator[tuple[Span, torch.Tensor]]]:
    """Analyse the updates and prepare their merge.

    Args:
        updates: For each client, its update.
        rule: The merge rule.
        options: Its options.
        rows: The clients' numbers of training rows, for rules that weigh by them.
        names: The clients' names.
        chunk_elements: Values held at once.

    Returns:
        The analysis, and the merged vector span by span in order, in the dtype of each tensor.

    Raises:
        UsageError: there is no update, or names or rows do not fit.
        ArtifactError: an update differs from the first in names, shapes or dtypes, or holds NaN or Inf.
    """
    statistics = measure(updates, names, chunk_elements)
    analysis = rule.describe(statistics, options)
    weights = torch.tensor(rule.weights(analysis, rows, options), dtype=torch.float64)
    keep = [kept_count(share, analysis.parameters) for share in rule.keep(analysis, options)]
    limits = thresholds(updates, keep, chunk_elements)

    def pieces() -> Iterator[tuple[Span, torch.Tensor]]:
        for spans, values in trimmed(updates, limits, chunk_elements):
            merged = rule.combine(values.double(), weights.to(values.device), options)
            parts = merged.split_with_sizes([span.stop - span.start for span in spans])
            for span, part in zip(spans, parts, strict=True):
                yield span, part.to(updates[0][span.name].dtype)

    return analysis, pieces()
