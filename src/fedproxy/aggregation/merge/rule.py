"""What a merge rule is: a frozen row of pure functions and a dataclass of options."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from fedproxy.aggregation.analyse import Analysis, Statistics, describe
from fedproxy.registry import build
from fedproxy.registry import require_range as require_range

Options = TypeVar("Options")


@dataclass(frozen=True)
class Place:
    """Where a chunk of the long vector lies, and whose updates are in it.

    A rule that draws at random draws from this alone, so its draws depend neither on the chunks nor on the order of
    the clients.

    Attributes:
        start: Index of the chunk's first coordinate in the long vector.
        names: The clients' names, [K].
        seed: Seed of the merge.
    """

    start: int
    names: Sequence[str]
    seed: int


@dataclass(frozen=True)
class Rule(Generic[Options]):
    """A merge rule.

    Attributes:
        name: Its name in configurations.
        options: Frozen dataclass of its options with defaults (float or Literal fields); it checks their values.
        keep: Share of its coordinates each client keeps, [K]: the largest magnitudes, the rest become zero.
        weights: Weight of each client, [K], summing to one, from the analysis, the clients' row counts (if known) and
            the options; none if the rule weighs nobody.
        combine: Trimmed values of some coordinates [K, n] and the weights [K], equal if there are none, both float64, →
            merged values [n]. It sees one chunk at a time, so it must treat each coordinate by itself.
        describe: The analysis from the collected statistics; a rule whose options set Eq. 10 gives its own.
        thin: Trimmed values of a chunk [K, n], float64, and its place → values [K, n] with some dropped at random;
            none if the rule leaves nothing to chance.
        scale: Positive factor of each client's values, [K], from the collected statistics; `combine` alone sees the
            scaled values, the analysis and `keep` do not. None if all are one.
    """

    name: str
    options: type[Options]
    keep: Callable[[Analysis, Options], Sequence[float]]
    weights: Callable[[Analysis, Sequence[int] | None, Options], Sequence[float] | None]
    combine: Callable[[torch.Tensor, torch.Tensor, Options], torch.Tensor]
    describe: Callable[[Statistics, Options], Analysis] = lambda statistics, options: describe(statistics)
    thin: Callable[[torch.Tensor, Place, Options], torch.Tensor] | None = None
    scale: Callable[[Statistics], Sequence[float]] | None = None


def equal_weights(analysis: Analysis) -> list[float]:
    """1/K for each client."""
    return [1.0 / analysis.clients] * analysis.clients


def build_options(rule: Rule[Options], given: Mapping[str, object]) -> Options:
    """The rule's own options with the given ones in place of the defaults.

    Raises:
        UsageError: an option is unknown, or its value of the wrong type or out of range.
    """
    return build("merge rule", rule.name, rule.options, given)
