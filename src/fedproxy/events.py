"""A run's log of events as others read it, while it grows and after."""

import contextlib
from pathlib import Path
from typing import Any

from fedproxy.artifacts import parse_json
from fedproxy.errors import ArtifactError

EVENTS = "events.jsonl"
"""RUN/events.jsonl: what happened when, a line each."""


def event_of(line: str | bytes) -> dict[str, Any]:
    """The event in a line of events.jsonl; nothing of a line that a kill or a full disk cut short."""
    try:
        event = parse_json(line, "an event")
    except ArtifactError:
        return {}
    return event if isinstance(event, dict) else {}


class Events:
    """A run's events.jsonl, read as it grows.

    Args:
        run: The run directory.
        begun: Whether what is in it now is left out.
    """

    def __init__(self, run: Path, *, begun: bool = False) -> None:
        self._path = run / EVENTS
        self._position = self._path.stat().st_size if begun and self._path.is_file() else 0

    def read(self) -> list[dict[str, Any]]:
        """The events that were added since, in order; a line that is not whole yet is left for the next time."""
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            file.seek(self._position)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._position += len(whole)
            return [event_of(line) for line in whole.splitlines()]
        return []
