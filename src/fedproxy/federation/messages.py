"""What the coordinator and the clients say to each other, and what a round ends in; bytes are `protocol`'s matter."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedproxy.tensors import Tensors


@dataclass(frozen=True)
class Order:
    """What a client gets for a round.

    Attributes:
        round: Counted from 1.
        adapter: The global adapter φ_t.
        conflict: The conflict of the round before, float32; none at first.
        voters: Number K of the updates that the conflict compares: its values are multiples of 1/K; 0 without one.
    """

    round: int
    adapter: Tensors
    conflict: Tensors | None
    voters: int = 0


@dataclass(frozen=True)
class Reply:
    """What a client returns: its update τ_k = φ_k − φ_t, and what the training was.

    Attributes:
        client: Its name.
        round: The round it answers.
        update: τ_k by tensor name, the layout of the order's adapter; it may lie on disk (`MappedTensors`).
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


Kind = Literal["declined", "failed", "invalid", "late"]


@dataclass(frozen=True)
class Refusal:
    """An answer without an update.

    Attributes:
        client: Who gives it, or was to give a reply.
        round: The round it belongs to.
        reason: One sentence.
        kind: "declined": the client's own limits forbid it; "failed": its training or its process ended in an error;
            "invalid": what it sent cannot be read. Only the last is held against it.
    """

    client: str
    round: int
    reason: str
    kind: Literal["declined", "failed", "invalid"] = "failed"


@dataclass(frozen=True)
class Closed:
    """A complete round: φ_{t+1}, the conflict, the server optimizer's state, and the record for `round.json`."""

    round: int
    adapter: dict[str, torch.Tensor]
    conflict: dict[str, torch.Tensor]
    server_state: dict[str, torch.Tensor]
    record: dict[str, Any]


def size_in_bytes(tensors: Tensors | None) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.element_size() for t in (tensors or {}).values())


def level_dtype(voters: int) -> torch.dtype:
    """The integers that carry a conflict among `voters` updates, as K − |Σ sign| = 0 ... K."""
    return torch.uint8 if voters <= 255 else torch.uint16
