"""A small adapter and replies to it."""

from typing import Any

import torch

from fedproxy.config import Federate
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.messages import Reply

PHI = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}


def update(*values: float) -> dict[str, torch.Tensor]:
    return {"a": torch.tensor(values[:2], dtype=torch.float32), "b": torch.tensor([[values[2]]], dtype=torch.float32)}


def reply(client: str, *values: float, round: int = 1, **changes: Any) -> Reply:
    fields = {
        "rows": 10,
        "tokens": 50,
        "steps": 2,
        "loss": 1.0,
        "seconds": 3.0,
        "update": update(*(values or (1, 1, 1))),
        "size": 12,
    }
    return Reply(client=client, round=round, **{**fields, **changes})


def coordinator(
    clients: Any = ("x", "y"), *, seed: int = 0, records: Any = (), conflict: Any = None, **settings: Any
) -> Coordinator:
    table = Federate(**{"merge": "mean", "rounds": 2, "quorum": 0.5, **settings})
    return Coordinator(clients, PHI, table, seed=seed, records=records, conflict=conflict)


def take(server: Coordinator, answer: Any) -> str | None:
    """The server receives the answer from the client it names."""
    return server.receive(answer.client, answer)
