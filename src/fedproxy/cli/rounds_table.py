"""The table of clients and rounds that is shown while a federation runs, from the run's own log of events."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from fedproxy.cli.output import console, live
from fedproxy.events import Events

_LOOK_SECONDS = 0.5
_SHOWN = 40
"""Clients in the table at most; a summary stands for the rest."""


class Rounds:
    """What events.jsonl says of the rounds, read as it grows.

    Args:
        events: The file, as it grows.
        brief: Whether what clients end with is worth a line each, and what a round begins with none.
    """

    def __init__(self, events: Events, *, brief: bool = False) -> None:
        self._events, self._brief = events, brief
        self._validated = ""
        self.round = 0
        self.closed = 0
        self.seconds: float | None = None
        self.clients: dict[str, str] = {}
        self.waiting = ""

    def read(self) -> list[str]:
        """Read what was added.

        Returns:
            One line for people for each event that is worth one.
        """
        return [line for event in self._events.read() for line in self._take(event)]

    def _take(self, event: dict[str, Any]) -> list[str]:
        kind, number = event.get("event"), event.get("round", 0)
        if kind == "waiting":
            self.waiting = f"round {number} waits: {len(event['present'])} of {event['needed']} needed clients are here"
            self.clients |= dict.fromkeys(event["present"], "here")
            return [f"Round {number} waits for clients; here: {', '.join(event['present']) or 'none'}."]
        if kind == "round_opened":
            self.round, self.waiting = number, ""
            self.clients |= dict.fromkeys(event["asked"], "training")
            return [] if self._brief else [f"Round {number}: asked {', '.join(event['asked'][:_SHOWN])}."]
        if kind == "answered":
            self.clients[event["client"]] = event["fault"] or "answered"
            if event["fault"]:
                return [f"Round {number}: {event['client']}: {event['fault']}"]
            return [f"Round {number}: {event['client']} has trained."] * (self._brief and len(self.clients) <= _SHOWN)
        if kind == "scoring":
            self.clients |= dict.fromkeys(event["asked"], "scoring")
            return []
        if kind == "scored":
            self.clients[event["client"]] = event["fault"] or "scored"
            return [f"Round {number}: no score of {event['client']}: {event['fault']}"] if event["fault"] else []
        if kind == "validated":
            self._validated = " No client scored it."
            if event.get("global") is not None:
                loss, best = event["global"]["loss"]["by_rows"], event["best_round"]
                self._validated = f" Validation loss {loss:.3f}; the best so far is round {best}."
            return []
        if kind == "round_failed":
            return [f"Round {number} failed: {event['reason']}"]
        if kind == "round_closed":
            said, self._validated = self._validated, ""
            self.closed, self.seconds = number, event["seconds"]
            return [f"Round {number} is stored, {event['seconds']:.1f} s.{said}"]
        return []

    def table(self) -> Table:
        """The table."""
        last = "" if self.seconds is None else f", the last took {self.seconds:.1f} s"
        title = self.waiting or f"round {self.round}, {self.closed} stored{last}"
        table = Table("client", "state", title=title, title_justify="left")
        for name, state in sorted(self.clients.items())[:_SHOWN]:
            table.add_row(name, state[:80])
        if len(self.clients) > _SHOWN:
            table.add_row("…", f"{len(self.clients) - _SHOWN} more")
        return table


@contextlib.contextmanager
def rounds_table(run: Path, *, resume: bool, bars: bool = False) -> Iterator[Callable[[], None]]:
    """Show the rounds of `run`: a live table on a terminal, otherwise a line for each event.

    Args:
        run: The run directory.
        resume: Whether the log that is there now is gone on with; otherwise it is removed before a round begins.
        bars: Whether bars of progress stand for the table: then a terminal gets nothing, and a file a line for what is
            done.

    Yields:
        To be called often once the rounds begin; it looks at the log twice a second.
    """
    rounds = Rounds(Events(run, begun=resume), brief=bars)
    target, looked = console(), 0.0
    if bars and target.is_terminal:
        yield lambda: None
        return
    with live() as shown:

        def update() -> None:
            nonlocal looked
            if time.monotonic() - looked < _LOOK_SECONDS:
                return
            looked = time.monotonic()
            for line in rounds.read():
                target.print(line)
            if target.is_terminal and rounds.clients:
                shown.update(rounds.table(), refresh=True)

        yield update
        looked = 0.0
        update()
