"""Registries: a row is chosen by its name, and its options, a dataclass, are checked against what a user gave."""

import difflib
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from fedproxy.errors import UsageError

Row = TypeVar("Row")
Options = TypeVar("Options")


def choose(kind: str, name: str, registry: Mapping[str, Row]) -> Row:
    """The row called `name`.

    Args:
        kind: What the registry holds, for the error: "merge rule".
        name: The name asked for.
        registry: Name → row.

    Raises:
        UsageError: there is no such row; the message lists those there are and guesses the one meant.
    """
    if name in registry:
        return registry[name]
    close = difflib.get_close_matches(str(name), registry, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UsageError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(registry) or 'none'}.")


def build(kind: str, name: str, options: type[Options], given: Mapping[str, object]) -> Options:
    """The options with the given values in place of the defaults.

    Args:
        kind: What the registry holds, for errors: "merge rule".
        name: The row's name, for errors.
        options: Dataclass with fields of type float or Literal.
        given: Values by name.

    Raises:
        UsageError: an option is unknown, or its value of the wrong type or out of range.
    """
    kinds = typing.get_type_hints(options)
    return options(**{key: _checked(kind, name, key, value, kinds) for key, value in given.items()})


def _checked(kind: str, name: str, key: str, value: object, kinds: Mapping[str, Any]) -> object:
    wanted = choose(f"option of the {kind} {name}", key, kinds)
    if typing.get_origin(wanted) is Literal:
        allowed = typing.get_args(wanted)
        if value not in allowed:
            raise UsageError(f"{name}: {key} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")
        return allowed[allowed.index(value)]  # the command line gives 64.0 for 64
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name}: {key} is {value!r}; it must be a number.")
    return float(value)


def require_range(owner: str, name: str, value: float, low: float, high: float) -> None:
    """Check low ≤ value ≤ high, for the `__post_init__` of an options dataclass.

    Args:
        owner: Whose option it is, for the error.
        name: The option.
        value: Its value.
        low: The smallest allowed.
        high: The largest allowed.

    Raises:
        UsageError: the value is outside, or NaN.
    """
    if not low <= value <= high:
        raise UsageError(f"{owner}: {name} is {value:g}; it must lie between {low:g} and {high:g}.")
