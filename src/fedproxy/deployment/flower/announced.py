"""Told between gateway and the process that drives the rounds: that orders were sent, and what became of each."""

from pathlib import Path


class Announced:
    """What is announced in a folder: a file for each order that is done with, named by its identifier, and one for all.

    An empty file says that the answer has come whole; any other, why none will come.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._sent = folder, folder / "sent"

    def send(self) -> None:
        """Say that orders were sent."""
        self._sent.touch()

    @property
    def sent(self) -> int:
        """A number that is another one when orders were sent since."""
        try:
            return self._sent.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def done(self, identifier: str) -> str | None:
        """What became of an order: "" once its answer is there, the reason where none will come, else nothing."""
        try:
            return (self._folder / identifier).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def announce(self, identifier: str, reason: str = "") -> None:
        """Say what became of an order."""
        part = self._folder / f"{identifier}.part"
        part.write_text(reason, encoding="utf-8")
        part.replace(self._folder / identifier)
