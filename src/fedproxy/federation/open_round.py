"""An open round: what it asks of whom, what came, what did not count, and the record that it leaves."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedproxy.errors import FederationError
from fedproxy.federation.faults import Faults
from fedproxy.federation.messages import Answer, Order, Reply, order_size

if TYPE_CHECKING:
    from fedproxy.federation.secure.round import SecureRound


class QuorumError(FederationError):
    """A round with too few valid replies; the round stays undone.

    Attributes:
        repeatable: Whether asking again can change anything: a client did not answer in time, failed, or was not
            asked. Replies that were all there and invalid would come again, since training is deterministic.
    """

    def __init__(self, message: str, *, repeatable: bool) -> None:
        super().__init__(message)
        self.repeatable = repeatable


@dataclass
class OpenRound:
    """An attempt at a round: what it asks of whom, what came, and what did not count.

    Attributes:
        round: Its number.
        orders: The training orders, by client.
        asked: The clients that the round asks, sorted.
        needed: Replies that it needs.
        everyone: Whether it asks all who may be asked.
        sums: Its secure sums, with [federate] secure.
        now: The orders of the present step, by client.
        replies: The replies that count so far.
        up: Bytes that came, by client.
        down: Bytes that went, by client.
        gone: Who did not answer in time in a step before.
        norms: Norm of each update.
        answered: Who answered in the present step.
        overdue: Who took longer than the deadline.
        faults: What did not count.
    """

    round: int
    orders: dict[str, Order]
    asked: tuple[str, ...]
    needed: int
    everyone: bool
    sums: "SecureRound | None" = None
    now: dict[str, Order] = field(default_factory=dict)
    replies: dict[str, Reply] = field(default_factory=dict)
    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    gone: set[str] = field(default_factory=set)
    norms: dict[str, float] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    overdue: set[str] = field(default_factory=set)
    faults: Faults = field(default_factory=Faults)

    def ask(self, orders: dict[str, Order]) -> None:
        """Begin a step: what it asks of each client."""
        self.now, self.answered = orders, set()
        self.down.update({name: order_size(order) for name, order in orders.items()})

    @property
    def silent(self) -> set[str]:
        """Who did not answer in time, in this step or one before."""
        return self.gone | (self.now.keys() - self.answered)

    def record(self) -> dict[str, Any]:
        """Who was asked and what did not count, in an order that does not depend on who was first."""
        return {
            "asked": list(self.asked),
            "dropouts": [name for name in self.asked if name in self.silent],
            "refused": self.faults.of("declined", "failed"),
            "quarantined": self.faults.of("invalid", "late"),
        }

    def late(self, sender: str, answer: Answer) -> str | None:
        """Why nothing is awaited from the sender any more, if so."""
        if answer.round < self.round:
            return other_round(answer.round, self.round)
        if sender in self.answered:
            return "it replied already"
        if sender not in self.now:
            return "it was not asked in this round"
        return None

    def miss(self, quorum: float, why: str) -> QuorumError:
        """The error of a round without a quorum.

        Args:
            quorum: [federate] quorum.
            why: What is wrong beside the number of replies, if anything.
        """
        record = self.record()
        faults = [f"{fault['client']}: {fault['reason']}" for fault in record["refused"] + record["quarantined"]]
        faults += [f"{name}: no reply in time" for name in record["dropouts"] if name not in self.overdue]
        failed = any(fault["kind"] == "failed" for fault in record["refused"])
        said = f"the quorum {quorum} needs {self.needed}. {why}".rstrip()
        return QuorumError(
            f"Round {self.round} has {len(self.replies)} valid replies of {len(self.asked)}; {said}"
            + "".join(f"\n  - {fault}" for fault in faults),
            repeatable=bool(record["dropouts"]) or failed or not self.everyone,
        )

    def closed(
        self,
        replies: Sequence[Reply],
        scores: Mapping[str, Mapping[str, Any]],
        attempts: Sequence[Mapping[str, Any]],
        analysis: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What `round.json` holds of the round.

        Args:
            replies: Those that were merged.
            scores: What their records hold of their scores, by client.
            attempts: The records of the attempts before.
            analysis: How the updates relate.
        """
        return {
            "round": self.round,
            "clients": {
                reply.client: {
                    "rows": reply.rows,
                    "tokens": reply.tokens,
                    "steps": reply.steps,
                    "loss": reply.loss,
                    "seconds": reply.seconds,
                    "tokens_per_second": reply.tokens / reply.seconds if reply.seconds else 0.0,
                    "peak_memory_bytes": reply.peak_memory,
                    "wire": reply.wire,
                    "bytes_up": self.up[reply.client],
                    "bytes_down": self.down[reply.client],
                    **({} if reply.epsilon is None else {"epsilon": reply.epsilon}),
                    **scores[reply.client],
                }
                for reply in replies
            },
            **self.record(),
            "attempts": list(attempts),
            "norms": {name: self.norms[name] for name in sorted(self.norms)},
            "analysis": dict(analysis),
        }


def other_round(given: int, current: int) -> str:
    """That an answer is to another round."""
    return f"it answers round {given}, this is round {current}"
