"""What became of each client's answers: for the clients, which are told with every welcome, and for the audit log.

The rounds are driven by another process than the one that clients speak with; what it writes of them is read here.
"""

from pathlib import Path
from typing import Any

from fedproxy.deployment.audit import Audit
from fedproxy.deployment.welcome import Verdict
from fedproxy.events import Events
from fedproxy.federation.store import RoundStore

GIVES_NONE = "its reply brought no scores: it keeps no rows back, or declines to score"
LATE, FEW = "it did not come in time", "too few answers of the round counted, and it is repeated if that can help"


class Verdicts:
    """The last verdict on each client, as the rounds go on.

    Args:
        run: The run directory.
        audit: Where it is noted whose answer did not count, whose score is missing, and which round failed.
    """

    def __init__(self, run: Path, audit: Audit) -> None:
        self._store, self._events, self._audit = RoundStore(run / "rounds"), Events(run, begun=True), audit
        self._verdicts: dict[str, Verdict] = {}
        self._faults: dict[str, str] = {}
        self._silent: set[str] = set()  # who gives no scores, which is noted once
        if closed := self._store.count():
            self._close(self._store.record(closed))

    def of(self, client: str) -> Verdict | None:
        """What became of the client's last answer whose round has ended; none so far."""
        return self._verdicts.get(client)

    def follow(self) -> None:
        """Take in what the run has written since.

        Raises:
            ArtifactError: a record is damaged.
            ResourceError, UsageError: the audit log cannot be written.
        """
        for event in self._events.read():
            kind, number = event.get("event"), event.get("round", 0)
            if kind == "round_opened":
                self._faults = dict.fromkeys(event["asked"], LATE)
            elif kind == "answered":
                self._take(number, event["client"], event["fault"])
            elif kind == "scored" and event["fault"]:
                self._miss(number, event["client"], event["fault"])
            elif kind == "round_failed":
                self._audit.note("round failed", round=number, reason=event["reason"])
                self._verdicts |= {client: Verdict(number, fault or FEW) for client, fault in self._faults.items()}
            elif kind == "round_closed":
                record = self._store.record(number)
                for fault in record["quarantined"]:  # some are found when all have answered
                    if self._faults.get(fault["client"]) == "":
                        self._take(number, fault["client"], fault["reason"])
                if "validation" in record:
                    self._look_for_scores(record)
                self._close(record)

    def _take(self, number: int, client: str, fault: str | None) -> None:
        if fault:
            self._audit.note("left out", client, round=number, reason=fault)
        self._faults[client] = fault or ""

    def _look_for_scores(self, record: dict[str, Any]) -> None:
        """Note whose score of a round's adapter never came, and who has ceased to give any."""
        for client in record["validation"]["dropouts"]:
            self._miss(record["round"], client, LATE)
        silent = {client for client, one in record["clients"].items() if "validation" not in one}
        for client in sorted(silent - self._silent):
            self._miss(record["round"], client, GIVES_NONE)
        self._silent = (self._silent - record["clients"].keys()) | silent

    def _miss(self, number: int, client: str, reason: str) -> None:
        self._audit.note("not scored", client, round=number, reason=reason)

    def _close(self, record: dict[str, Any]) -> None:
        number, reasons = record["round"], dict.fromkeys(record["dropouts"], LATE)
        reasons |= {fault["client"]: fault["reason"] for fault in record["refused"] + record["quarantined"]}
        reasons |= dict.fromkeys(record["clients"], "")
        self._verdicts |= {client: Verdict(number, reason) for client, reason in reasons.items()}
