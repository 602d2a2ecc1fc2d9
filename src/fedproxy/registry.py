"""The axes of the method: on each, choices by name, those of the house and those that other packages add.

Another package adds a choice by an entry point in a group of `AXES`, whose name is the choice's name; a program, by
`Axis.register`. A choice's options are a dataclass, checked against what a user gave.
"""

import difflib
import importlib
import typing
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Literal, TypeVar

from fedproxy.errors import UsageError

Row = TypeVar("Row")
Options = TypeVar("Options")

AXES = {
    "fedproxy.rules": ("fedproxy.aggregation.merge", "RULES"),
    "fedproxy.scores": ("fedproxy.compression.scores", "SCORES"),
    "fedproxy.regularisers": ("fedproxy.aggregation.regularise", "REGULARISERS"),
    "fedproxy.spaces": ("fedproxy.aggregation.space", "SPACES"),
    "fedproxy.encodings": ("fedproxy.federation.wire", "ENCODINGS"),
    "fedproxy.methods": ("fedproxy.methods", "METHODS"),
    "fedproxy.attacks": ("fedproxy.privacy.attacks", "ATTACKS"),
    "fedproxy.server_optimizers": ("fedproxy.aggregation.server_optimizer", "SERVER_OPTIMIZERS"),
}
"""Group of entry points → the module and the name of its `Axis`: who checks a name need not import what it means."""


def axis(group: str) -> "Axis[Any]":
    """The axis of a group of entry points."""
    module, name = AXES[group]
    found: Axis[Any] = getattr(importlib.import_module(module), name)
    return found


class Axis(Mapping[str, Row], Generic[Row]):
    """The choices on one axis, by name: a mapping that reads another package's choice when it is first asked for.

    Args:
        kind: What it holds, for errors: "merge rule".
        group: The group of entry points by which packages add to it.
        contract: The class that every choice is an instance of.
        house: The house's own choices.
    """

    def __init__(self, kind: str, group: str, contract: type[Row], house: Mapping[str, Row]) -> None:
        self.kind, self.group, self._contract, self._rows = kind, group, contract, dict(house)
        self._found: dict[str, EntryPoint] | None = None

    @property
    def _foreign(self) -> dict[str, EntryPoint]:
        if self._found is None:
            found: dict[str, EntryPoint] = {}
            for point in entry_points(group=self.group):
                if point.name in self._rows or found.setdefault(point.name, point) is not point:
                    raise UsageError(f"{self._whose(point)} bears a name that is taken. Remove or rename it.")
            self._found = found
        return self._found

    def __getitem__(self, name: str) -> Row:
        if name not in self._rows:
            self._rows[name] = self._loaded(self._foreign[name])
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._rows, *self._foreign)))

    def __len__(self) -> int:
        return len(self._rows.keys() | self._foreign)

    def __contains__(self, name: object) -> bool:
        return name in self._rows or name in self._foreign

    def choose(self, name: str) -> Row:
        """The choice called `name`.

        Raises:
            UsageError: there is none, or what a package gives for it cannot be used.
        """
        return choose(self.kind, name, self)

    def register(self, row: Row) -> Row:
        """Add a choice by its own name for as long as this process lives; other processes need an entry point.

        Args:
            row: The choice, of the class that the axis holds: `Rule`, `Registered` (a score), `Regulariser`, `Space` or
                `Encoding`.

        Returns:
            The choice.

        Raises:
            UsageError: the name is taken by another choice, or the row is not what this axis holds.

        Example:
            `fedproxy.register_rule(LOUDEST)`; afterwards `merge = "loudest"` names it (docs/how_to/add_a_choice.md).
        """
        name = str(getattr(row, "name", ""))
        self._check(name, row, f"The {self.kind} {name!r}")
        if name in self._foreign or self._rows.setdefault(name, row) is not row:
            raise UsageError(f"The {self.kind} {name!r} exists already; choose another name ({self.group}).")
        return row

    def _check(self, name: str, row: object, who: str) -> None:
        if not isinstance(row, self._contract):
            raise UsageError(f"{who} is a {type(row).__name__}; it must be a {self._contract.__name__} ({self.group}).")
        if (own := getattr(row, "name", None)) != name:
            raise UsageError(f"{who} calls itself {own!r}; both names must be the same ({self.group}).")

    def _whose(self, point: EntryPoint) -> str:
        package = point.dist.name if point.dist else point.value
        return f"The {self.kind} {point.name!r} of the package {package} ({point.value})"

    def _loaded(self, point: EntryPoint) -> Row:
        try:
            found: Row = point.load()
        except Exception as error:  # another package's code: whatever goes wrong in it is its own
            raise UsageError(f"{self._whose(point)} cannot be loaded: {error!r:.300}. Mend or remove it.") from error
        self._check(point.name, found, self._whose(point))
        return found


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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' if one of `known` is close to `word`, else ''."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f' Did you mean "{close[0]}"?' if close else ""


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
