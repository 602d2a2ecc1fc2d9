"""FedAvg: the weighted mean of the updates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fedproxy.aggregation.analyse import Analysis
from fedproxy.aggregation.merge.rule import Rule, equal_weights
from fedproxy.errors import UsageError


@dataclass(frozen=True)
class MeanOptions:
    """Options of `mean`.

    Attributes:
        weights: "rows" weighs each client by its number of rows, or all alike where no numbers are known;
            "uniform" weighs all alike.
    """

    weights: Literal["rows", "uniform"] = "rows"


def row_weights(analysis: Analysis, rows: Sequence[int] | None, options: MeanOptions) -> list[float]:
    """w_k = rows_k / Σ rows, or 1/K.

    Raises:
        UsageError: another number of rows than of clients, a negative one, or only zeros.
    """
    if rows is None or options.weights == "uniform":
        return equal_weights(analysis)
    if len(rows) != analysis.clients or min(rows) < 0 or sum(rows) == 0:
        raise UsageError(
            f"mean: rows is {list(rows)}; give one number of rows a client ({analysis.clients}), none negative, "
            "not all zero, or set weights=uniform."
        )
    return [count / sum(rows) for count in rows]


def mean(values: torch.Tensor, weights: torch.Tensor, options: object) -> torch.Tensor:
    """Weighted mean: merged_p = Σ_k w_k τ_k,p, summed in the order of the clients.

    Args:
        values: [K, n], float64.
        weights: [K], summing to one.
        options: Not used here.

    Returns:
        [n].

    Reference: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017,
    Alg. 1.
    """
    total = torch.zeros_like(values[0])
    for weight, row in zip(weights, values, strict=True):
        total += weight * row
    return total


MEAN = Rule(
    name="mean",
    options=MeanOptions,
    keep=lambda analysis, options: [1.0] * analysis.clients,
    weights=row_weights,
    combine=mean,
    by_rows=lambda options: options.weights == "rows",
    from_sums=lambda options: None,
)
