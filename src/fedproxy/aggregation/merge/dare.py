"""DARE: drop each coordinate of each update with a probability, and rescale the rest so that the expectation stays.

Whether a coordinate is dropped depends on the seed, the client's name and the coordinate's index alone.

Reference: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
2024, Section 3.1.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from fedproxy.aggregation.merge.mean import MeanOptions, mean, row_weights
from fedproxy.aggregation.merge.rule import Place, Rule, equal_weights, require_range
from fedproxy.aggregation.merge.ties import TiesOptions, ties
from fedproxy.seeds import derive_seed
from fedproxy.splitmix64 import shifted, splitmix64

LARGEST_DROP = 0.9999
_BITS = 53


@dataclass(frozen=True)
class DareOptions:
    """Options of `dare`.

    Attributes:
        drop: Probability that a coordinate of a client is dropped.
        weights: As of `mean`: "rows" or "uniform".
    """

    drop: float = 0.9
    weights: Literal["rows", "uniform"] = "rows"

    def __post_init__(self) -> None:
        require_range("dare", "drop", self.drop, 0.0, LARGEST_DROP)


@dataclass(frozen=True)
class DareTiesOptions:
    """Options of `dare-ties`.

    Attributes:
        drop: Probability that a coordinate of a client is dropped.
    """

    drop: float = 0.9

    def __post_init__(self) -> None:
        require_range("dare-ties", "drop", self.drop, 0.0, LARGEST_DROP)


def drop_and_rescale(values: torch.Tensor, place: Place, drop: float) -> torch.Tensor:
    """Set each entry to zero with probability `drop` and divide the others by 1 - drop.

    Args:
        values: Updates [K, n], float64.
        place: Whose they are and where the first coordinate lies.
        drop: In 0 ... 1, below 1.

    Returns:
        [K, n], float64.
    """
    indices = torch.arange(place.start, place.start + values.shape[1], device=values.device)
    limit = int(drop * (1 << _BITS))
    result = values / (1.0 - drop)
    for row, name in zip(result, place.names, strict=True):
        draws = shifted(splitmix64(derive_seed(place.seed, "dare", name), indices), 64 - _BITS)
        row.masked_fill_(draws < limit, 0.0)
    return result


DARE = Rule(
    name="dare",
    options=DareOptions,
    keep=lambda analysis, options: [1.0] * analysis.clients,
    weights=lambda analysis, rows, options: row_weights(analysis, rows, MeanOptions(options.weights)),
    combine=lambda values, weights, options: mean(values, weights, MeanOptions()),
    by_rows=lambda options: options.weights == "rows",
    thin=lambda values, place, options: drop_and_rescale(values, place, options.drop),
)

DARE_TIES = Rule(
    name="dare-ties",
    options=DareTiesOptions,
    keep=lambda analysis, options: [1.0] * analysis.clients,
    weights=lambda analysis, rows, options: equal_weights(analysis),
    combine=lambda values, weights, options: ties(values, weights, TiesOptions()),
    thin=lambda values, place, options: drop_and_rescale(values, place, options.drop),
)
