"""How a table checks itself: built from a file or in Python, it is right or a `TableError` says all that is wrong."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from fedproxy.errors import ConfigError
from fedproxy.registry import axis, did_you_mean

Table = TypeVar("Table")

_TYPES = {"int_type": "a whole number", "float_type": "a number", "bool_type": "true or false"}
_TYPES |= {"string_type": "a string", "list_type": "a list", "dict_type": "a table"}
_TYPES |= {"missing": "given", "multiple_argument_values": "given once"}


class TableError(ConfigError):
    """A table with problems.

    Attributes:
        faults: Key → a sentence that begins with the key.
        rest: The table without these keys, to look for further problems with; none if it cannot do without one.
    """

    def __init__(self, kind: type, faults: dict[str, str], rest: Any) -> None:
        super().__init__(kind.__name__, [f"[{kind.__name__.lower()}] {fault}" for fault in faults.values()])
        self.faults, self.rest = faults, rest


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def table(cls: type[Table]) -> type[Table]:
    """Make a class a frozen dataclass whose constructor checks every value, and raises TableError.

    Types are held to strictly, as TOML has them, except that a whole number is taken for a float.
    """
    made: Any = dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))(cls)
    construct, names = made.__init__, [field.name for field in dataclasses.fields(made)]

    @functools.wraps(construct)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        try:
            construct(self, *args, **values)
        except ValidationError as error:
            given = dict(zip(names, args, strict=False)) | values
            faults = _faults(error.errors(), given, names)
            rest = self
            try:
                construct(self, **{name: value for name, value in given.items() if name not in faults})
            except ValidationError:
                rest = None
            raise TableError(cls, faults, rest) from None

    made.__init__ = checked
    return cast(type[Table], made)


def _faults(errors: list[ErrorDetails], given: dict[str, Any], names: list[str]) -> dict[str, str]:
    wrong: dict[str, list[str]] = {}
    for error in errors:
        key, *inner = error["loc"]
        says = _TYPES.get(error["type"], error["msg"].removeprefix("Input should be "))
        if inner and isinstance(inner[-1], int):
            says += f" in place {inner[-1] + 1}"
        wrong.setdefault(names[key] if isinstance(key, int) and key < len(names) else str(key), []).append(says)
    found = {}
    for key, texts in wrong.items():
        says = " or ".join(dict.fromkeys(texts)).removesuffix(".")
        found[key] = f"{key} = {given.get(key)!r:.200}: must be {says}{'.' * (says[-1] != '?')}"
        if key not in names:
            found[key] = f'has no key "{key}".{did_you_mean(key, names)}'
    return found


class _Check:
    """Of an annotated type: checks a value that has the type; what it says completes the sentence 'must be ...'."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._kept, handler(source))

    def _kept(self, value: Any) -> Any:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Rule(_Check):
    """A value that satisfies `holds`."""

    says: str
    holds: Callable[[Any], object]

    def _kept(self, value: Any) -> Any:
        if not self.holds(value):
            raise PydanticCustomError("rule", "{says}", {"says": self.says})
        return value


@dataclasses.dataclass(frozen=True)
class Choice(_Check):
    """The name of a choice on the axis of a group of entry points that `fits`; "" for none yet if it may be unset."""

    group: str
    fits: Callable[[Any], bool] | None = None
    unset: bool = False

    @property
    def names(self) -> list[str]:
        """What can be chosen."""
        rows = axis(self.group)
        return sorted(name for name in rows if self.fits is None or self.fits(rows[name]))

    def _kept(self, value: str) -> str:
        rows = axis(self.group)
        if (value or not self.unset) and (value not in rows or (self.fits is not None and not self.fits(rows[value]))):
            says = f"one of {', '.join(self.names)}.{did_you_mean(value, self.names)}"
            raise PydanticCustomError("choice", "{says}", {"says": says})
        return value


@dataclasses.dataclass(frozen=True)
class Keys(_Check):
    """Some keys of another table, with values that it can have; a table in it stays one, as JSON has it."""

    kind: type

    def _kept(self, value: dict[str, Any]) -> dict[str, Any]:
        try:
            whole = self.kind(**value)
        except TableError as error:
            says = f"keys and values of [{self.kind.__name__.lower()}]: {' '.join(error.faults.values())}"
            raise PydanticCustomError("keys", "{says}", {"says": says}) from None
        plain: dict[str, Any] = dataclasses.asdict(cast(Any, whole))
        return {key: plain[key] for key in value}


@dataclasses.dataclass(frozen=True)
class Within:
    """A table in a table: given as one, or as its keys and values."""

    kind: type

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._made, handler(source))

    def _made(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        try:
            return self.kind(**value)
        except TableError as error:
            says = f"a table with the right keys and values: {' '.join(error.faults.values())}"
            raise PydanticCustomError("within", "{says}", {"says": says}) from None


def read_table(kind: type[Table], values: Any, where: str, problems: list[str]) -> Table:
    """Build a table, adding to `problems` whatever is wrong with it; what is wrong is left out.

    Args:
        kind: The dataclass.
        values: The table.
        where: Its name, for the problems; "" for the whole file.
        problems: One sentence is added for each.
    """
    if not isinstance(values, dict):
        problems.append(f"[{where}] must be a table.")
        return kind()
    try:
        return kind(**values)
    except TableError as error:
        problems += [f"[{where}] {fault}" if where else fault for fault in error.faults.values()]
        rest: Table = error.rest
        return rest
