"""The answers of a round that did not count, each with its reason."""

from fedproxy.federation.messages import Kind
from fedproxy.foreign import plain

_REASON_CHARACTERS = 500
"""Of a reason at most so much is recorded: a client may have a say in it."""


class Faults:
    """What did not count, as it is found."""

    def __init__(self) -> None:
        self._found: list[dict[str, str]] = []

    def add(self, client: str, kind: Kind, reason: str) -> str:
        """Take a fault down, and give its reason as it is recorded."""
        said = plain(reason, _REASON_CHARACTERS)
        self._found.append({"client": client, "kind": kind, "reason": said})
        return said

    def of(self, *kinds: Kind) -> list[dict[str, str]]:
        """The faults of these kinds, or all, in an order that does not depend on who was first."""
        chosen = (fault for fault in self._found if not kinds or fault["kind"] in kinds)
        return sorted(chosen, key=lambda fault: (fault["client"], fault["kind"], fault["reason"]))
