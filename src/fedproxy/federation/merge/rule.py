"""What a merge rule is: a frozen row of pure functions and a dataclass of options."""

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch

from fedproxy.errors import UsageError
from fedproxy.federation.analyse import Analysis, Statistics, describe
from fedproxy.federation.choice import choose

Options = TypeVar("Options")


@dataclass(frozen=True)
class Rule(Generic[Options]):
    """A merge rule.

    Attributes:
        name: Its name in configurations.
        options: Frozen dataclass of its options with defaults (float or Literal fields); it checks their values.
        keep: Share of its coordinates each client keeps, [K]: the largest magnitudes, the rest become zero.
        weights: Weight of each client, [K], from the analysis, the clients' row counts (if known) and the options.
        combine: Trimmed values of some coordinates [K, n] and the weights [K], both float64, → merged values [n]. It
            sees one chunk at a time, so it must treat each coordinate by itself.
        describe: The analysis from the collected statistics; a rule whose options set Eq. 10 gives its own.
    """

    name: str
    options: type[Options]
    keep: Callable[[Analysis, Options], Sequence[float]]
    weights: Callable[[Analysis, Sequence[int] | None, Options], Sequence[float]]
    combine: Callable[[torch.Tensor, torch.Tensor, Options], torch.Tensor]
    describe: Callable[[Statistics, Options], Analysis] = lambda statistics, options: describe(statistics)


def equal_weights(analysis: Analysis) -> list[float]:
    """1/K for each client."""
    return [1.0 / analysis.clients] * analysis.clients


def build_options(rule: Rule[Options], given: Mapping[str, object]) -> Options:
    """The rule's options with the given ones in place of the defaults.

    Raises:
        UsageError: an option is unknown, or its value of the wrong type or out of range.
    """
    kinds = typing.get_type_hints(rule.options)
    return rule.options(**{name: _checked(rule.name, name, value, kinds) for name, value in given.items()})


def _checked(rule: str, name: str, value: object, kinds: Mapping[str, Any]) -> object:
    kind = choose(f"option of the merge rule {rule}", name, kinds)
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if value not in allowed:
            raise UsageError(f"{rule}: {name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{rule}: {name} is {value!r}; it must be a number.")
    return float(value)


def require_range(rule: str, name: str, value: float, low: float, high: float) -> None:
    """Check low ≤ value ≤ high, for the `__post_init__` of an options dataclass.

    Raises:
        UsageError: the value is outside, or NaN.
    """
    if not low <= value <= high:
        raise UsageError(f"{rule}: {name} is {value:g}; it must lie between {low:g} and {high:g}.")
