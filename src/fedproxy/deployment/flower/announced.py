"""What became of orders, told by the gateway to the process that drives the rounds."""

from pathlib import Path


class Announced:
    """What the gateway announces in a folder: a file for each order that is done with, named by its identifier.

    An empty one says that the answer has come whole; any other, why none will come.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

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
