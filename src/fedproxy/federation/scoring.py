"""The second half of a round: the clients that train and give scores are asked what the merged adapter reaches."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fedproxy.errors import ArtifactError
from fedproxy.federation.faults import Faults
from fedproxy.federation.messages import Answer, Closed, Order, Refusal, Scored
from fedproxy.federation.validation import as_scores, check_score, summary


class Scoring:
    """What clients say of the adapter of a round that was merged, one answer at a time.

    Args:
        closed: The round; what is said is added to its record.
        orders: The orders that let clients score, by name; each of these clients gave scores with its reply.
    """

    def __init__(self, closed: Closed, orders: Mapping[str, Order]) -> None:
        self.orders, self._closed = orders, closed
        self._answered: set[str] = set()
        self._faults = Faults()

    def receive(self, sender: str, answer: Answer) -> str | None:
        """Take a client's answer; the arguments and the result are as of `Coordinator.receive`."""
        if sender not in self.orders or sender in self._answered or answer.round < self._closed.round:
            return self._faults.add(sender, "late", "it was not asked to score, or did so already")
        self._answered.add(sender)
        if isinstance(answer, Refusal):
            return self._faults.add(sender, answer.kind, answer.reason)
        scores = self._scores(sender)
        try:
            if not isinstance(answer, Scored) or (answer.client, answer.round) != (sender, self._closed.round):
                raise ArtifactError(f"it is no score of {sender} in round {self._closed.round}")
            check_score("global", answer.score, int(scores["own"]["rows"]))
            if answer.score.rows != scores["own"]["rows"]:
                raise ArtifactError(f"its scores are of {scores['own']['rows']} and of {answer.score.rows} rows")
        except ArtifactError as error:
            return self._faults.add(sender, "invalid", str(error))
        scores["global"] = asdict(answer.score)
        return None

    def _scores(self, client: str) -> dict[str, Any]:
        found: dict[str, Any] = self._closed.record["clients"][client]["validation"]
        return found

    def record(self) -> dict[str, Any]:
        """What the round's record says of it: who did not score and why, and the `summary` of the scores."""
        silent = sorted(set(self.orders) - self._answered)
        given = {name: one["validation"] for name, one in self._closed.record["clients"].items() if "validation" in one}
        return {
            "dropouts": silent,
            "faults": self._faults.of(),
            **summary({name: as_scores(scores) for name, scores in given.items()}),
        }
