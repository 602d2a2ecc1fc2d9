"""JSON values with their place in the file, so that a wrong one can be named."""

from typing import Any

from fedproxy.errors import ArtifactError

_LARGEST = 1e30
"""No quantity comes near it; larger ones have no room in a figure, and sums of the largest would overflow."""


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number of JSON, of a size that can be added up and drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def short(value: Any) -> str:
    """A value for an error message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Part:
    """A JSON object and its place in the file; every method raises `ArtifactError` for a value of the wrong type."""

    def __init__(self, value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise ArtifactError(
                f"{place} is {short(value)}, expected an object. Run the experiment again to write it anew."
            )
        self.value: dict[str, Any] = value
        self.place = place

    def _fail(self, key: str, expected: str) -> ArtifactError:
        return ArtifactError(f"{self.place}.{key} is {short(self.value[key])}, expected {expected}.")

    def part(self, key: str) -> "Part":
        """The object under `key`, empty if there is none."""
        found = self.value.get(key)
        return Part({} if found is None else found, f"{self.place}.{key}")

    def number(self, key: str) -> float | None:
        """The finite number under `key`, or None."""
        found = self.value.get(key)
        if found is not None and not is_number(found):
            raise self._fail(key, "a finite number")
        return found

    def integer(self, key: str) -> int | None:
        """The number under `key` as an integer, or None."""
        found = self.number(key)
        return None if found is None else int(found)

    def text(self, key: str, default: str) -> str:
        """The string under `key`, or `default`."""
        found = self.value.get(key)
        if found is not None and not isinstance(found, str):
            raise self._fail(key, "a string")
        return default if found is None else found

    def items(self, key: str) -> list[Any]:
        """The list under `key`, empty if there is none."""
        found = self.value.get(key)
        if found is not None and not isinstance(found, list):
            raise self._fail(key, "a list")
        return found or []

    def numbers(self, key: str) -> list[float]:
        """The list of finite numbers under `key`, empty if there is none."""
        found = self.items(key)
        if not all(is_number(value) for value in found):
            raise self._fail(key, "a list of finite numbers")
        return found
