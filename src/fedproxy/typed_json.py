"""Types for JSON that may be a stranger's, cut short, or of an earlier version, and how a file is read as one.

A part that is not there is empty, keys that are not known are passed over, null is as if it were not there, and a wrong
value is one `ArtifactError` that names its place.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic import model_validator as whole

from fedproxy.artifacts import read_json
from fedproxy.errors import ArtifactError

LARGEST = 1e30
"""No quantity comes near it; larger ones have no room in a figure, and sums of the largest would overflow."""
_SHOWN = 60
"""Letters of a wrong value that are shown."""


def given(value: Any) -> Any:
    """An object without what is null."""
    return {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, dict) else value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tables(value: Any) -> Any:
    if isinstance(value, list) and not all(isinstance(entry, dict) for entry in value):
        raise ValueError("expected tables")
    return value


T = TypeVar("T")
R = TypeVar("R", bound="Record")
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-LARGEST, le=LARGEST)]
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=-LARGEST, le=LARGEST)]
Cosine = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1.001, le=1.001)]
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
Block = Annotated[int, Field(ge=0, lt=10**9)]
Given = Annotated[dict[str, T], BeforeValidator(given)]
Settings = dict[str, Annotated[Any, AfterValidator(_tables)]]


class Record(BaseModel):
    """A JSON object."""

    model_config = ConfigDict(frozen=True)

    @whole(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        return given(value)


def as_record(value: Any, kind: type[R], source: str) -> R:
    """Check what a file holds, and give it its type.

    Args:
        value: What it holds.
        kind: The type.
        source: The file's name in messages.

    Raises:
        ArtifactError: a part is wrong; the message names the place and the value.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        wrong = min(error.errors(include_url=False), key=lambda each: each["type"] == "missing")
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in wrong["loc"] if key != "[key]")
    says = wrong["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    held = repr(wrong["input"])
    held = held if len(held) <= _SHOWN else held[: _SHOWN - 3] + "..."
    what = "missing" if wrong["type"] == "missing" else f"{held}: {says}"
    raise ArtifactError(f"{source}{place} is {what}. Run the experiment again to write it anew.")


def read_record(path: Path, kind: type[R]) -> R:
    """Read a file of JSON as its type.

    Raises:
        ArtifactError: it is missing or damaged, or a part is wrong; the message names the place and the value.
    """
    return as_record(read_json(path), kind, str(path))
