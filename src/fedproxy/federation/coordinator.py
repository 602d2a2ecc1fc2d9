"""The server's mind without hands: what a round sends, which replies count, and what they make together.

It opens no socket, reads no file and imports no engine; engines drive it:

    order = coordinator.begin()          # what every client gets
    coordinator.receive(reply)           # one at a time; a reply that cannot be used is quarantined with its reason
    closed = coordinator.close()         # the merged adapter, or FederationError without a quorum

Replies are merged in the order of the clients' names, so the result does not depend on who was first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedproxy.config import Federate, seconds
from fedproxy.errors import ArtifactError, FederationError
from fedproxy.federation.analyse import conflict
from fedproxy.federation.merge import merge
from fedproxy.tensors import Tensors, check_finite, check_layout


@dataclass(frozen=True)
class Order:
    """What a client gets for a round: the global adapter φ_t, and the conflict of the round before (none at first)."""

    round: int
    adapter: Tensors
    conflict: Tensors | None


@dataclass(frozen=True)
class Reply:
    """What a client returns: its update τ_k = φ_k − φ_t, and what the training was.

    Attributes:
        client: Its name.
        round: The round it answers.
        update: τ_k by tensor name, the layout of the order's adapter.
        rows: Training rows.
        tokens: Tokens trained on.
        steps: Optimizer steps.
        loss: Mean training loss, nats per token.
        seconds: Time the training took.
    """

    client: str
    round: int
    update: Tensors
    rows: int
    tokens: int
    steps: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Closed:
    """A complete round: φ_{t+1}, the conflict its updates showed, and the record for `round.json`."""

    round: int
    adapter: dict[str, torch.Tensor]
    conflict: dict[str, torch.Tensor]
    record: dict[str, Any]


@dataclass
class _Open:
    order: Order
    replies: dict[str, Reply] = field(default_factory=dict)
    quarantined: list[dict[str, str]] = field(default_factory=list)


def size_in_bytes(tensors: Tensors | None) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.element_size() for t in (tensors or {}).values())


class Coordinator:
    """The rounds of one federation as a state machine; `adapter` is φ after the last complete round.

    Args:
        clients: Names of the clients.
        adapter: φ of the next round: the fresh adapter, or that of the last complete round.
        settings: The [federate] table.
        conflict: Conflict of the last complete round; none before the first.
        completed: Number of complete rounds.
    """

    def __init__(
        self,
        clients: Sequence[str],
        adapter: Tensors,
        settings: Federate,
        *,
        conflict: Tensors | None = None,
        completed: int = 0,
    ) -> None:
        self.clients = tuple(sorted(clients))
        self.completed = completed
        self.adapter, self._conflict, self._settings = adapter, conflict, settings
        self._open: _Open | None = None

    @property
    def done(self) -> bool:
        """Whether all rounds are complete."""
        return self.completed >= self._settings.rounds

    @property
    def needed(self) -> int:
        """Valid replies that a round needs."""
        return math.ceil(self._settings.quorum * len(self.clients))

    def begin(self) -> Order:
        """Open the next round."""
        if self._open is not None or self.done:
            raise RuntimeError("begin: a round is open, or all are complete")
        self._open = _Open(Order(self.completed + 1, self.adapter, self._conflict))
        return self._open.order

    def receive(self, reply: Reply) -> str | None:
        """Take a client's reply.

        Returns:
            None if it counts, else the reason why it is quarantined.
        """
        if self._open is None:
            raise RuntimeError("receive: no round is open")
        reason = self._fault(reply, self._open)
        if reason is None:
            self._open.replies[reply.client] = reply
        else:
            self._open.quarantined.append({"client": reply.client, "reason": reason})
        return reason

    def _fault(self, reply: Reply, state: _Open) -> str | None:
        if reply.client not in self.clients:
            return f"{reply.client} takes no part in this federation"
        if reply.round != state.order.round:
            return f"it answers round {reply.round}, this is round {state.order.round}"
        if reply.client in state.replies:
            return "it replied already"
        deadline = self._settings.deadline
        if deadline and reply.seconds > seconds(deadline):
            return f"it took {reply.seconds:.0f} s, the deadline is {deadline}"
        if reply.rows < 1 or reply.steps < 1 or not math.isfinite(reply.loss):
            return f"rows {reply.rows}, steps {reply.steps}, loss {reply.loss}: nothing was trained"
        try:
            check_layout(state.order.adapter, reply.update, reply.client)
            check_finite(reply.update, reply.client)
        except ArtifactError as error:
            return str(error)
        return None

    def close(self) -> Closed:
        """Merge what was received and end the round.

        Raises:
            FederationError: fewer valid replies than the quorum; the round stays undone.
        """
        if self._open is None:
            raise RuntimeError("close: no round is open")
        state, self._open = self._open, None
        replies = [state.replies[name] for name in sorted(state.replies)]
        if len(replies) < self.needed:
            reasons = "".join(f"\n  - {q['client']}: {q['reason']}" for q in state.quarantined)
            raise FederationError(
                f"Round {state.order.round} has {len(replies)} valid replies of {len(self.clients)}; the quorum "
                f"{self._settings.quorum} needs {self.needed}.{reasons}"
            )
        updates, names = [reply.update for reply in replies], [reply.client for reply in replies]
        rows = [reply.rows for reply in replies]
        merged, analysis = merge(updates, self._settings.merge, rows=rows, names=names, **self._settings.merge_options)
        adapter = {name: tensor + merged[name] for name, tensor in self.adapter.items()}
        closed = Closed(state.order.round, adapter, conflict(updates), self._record(state, replies, analysis.as_dict()))
        self.adapter, self._conflict, self.completed = adapter, closed.conflict, closed.round
        return closed

    def _record(self, state: _Open, replies: list[Reply], analysis: Mapping[str, Any]) -> dict[str, Any]:
        down = size_in_bytes(state.order.adapter) + size_in_bytes(state.order.conflict)
        return {
            "round": state.order.round,
            "clients": {
                reply.client: {
                    "rows": reply.rows,
                    "tokens": reply.tokens,
                    "steps": reply.steps,
                    "loss": reply.loss,
                    "seconds": reply.seconds,
                    "bytes_up": size_in_bytes(reply.update),
                    "bytes_down": down,
                }
                for reply in replies
            },
            "quarantined": state.quarantined,
            "analysis": dict(analysis),
        }
