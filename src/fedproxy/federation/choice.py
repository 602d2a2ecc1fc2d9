"""Choosing a row of a registry by its name."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from fedproxy.errors import UsageError

Row = TypeVar("Row")


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
