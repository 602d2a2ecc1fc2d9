"""A coordinator and clients with secure sums, without a model: what they say goes over the wire and back."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedproxy.config import Federate
from fedproxy.errors import FedproxyError
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.messages import Answer, Closed, Order, Refusal, Reply
from fedproxy.federation.protocol import decode_order, encode_order, encode_reply, order_limit, reply_limit, take_reply
from fedproxy.federation.secure.client import SecureClient
from fedproxy.federation.secure.form import Form
from fedproxy.privacy.sums import drawn
from fedproxy.tensors import Tensors, digest

NAMES = ("v", "w", "x", "y", "z")
SEVEN = tuple("abcdefg")
"""Enough that coordinates are contested."""
PHI: Tensors = {"a": torch.linspace(-1, 1, 24).reshape(4, 6), "b": torch.linspace(0, 1, 16)}
P = 40
ROWS = {**dict.fromkeys("abcdefg", 10), "v": 10, "w": 20, "x": 30, "y": 40, "z": 50}
Step = tuple[str, str]
STEPS: tuple[Step, ...] = (
    ("advertise", ""),
    ("share", ""),
    *((step, label) for label in ("values", "positive") for step in ("mask", "agree", "reveal")),
)
"""The steps of a round with both sums."""


def update(name: str, number: int = 1) -> dict[str, torch.Tensor]:
    """What a client makes of a round: much the same for all, so that signs agree here and there."""
    common, own = (torch.Generator().manual_seed(seed) for seed in (number, 1000 * number + ord(name)))
    return {
        key: (torch.randn(tensor.shape, generator=common) + torch.randn(tensor.shape, generator=own)) / 10
        for key, tensor in PHI.items()
    }


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def reply(name: str, order: Order, change: Tensors) -> Reply:
    chosen = {key: change[key] for key in order.adapter}
    return Reply(name, order.round, chosen, rows=ROWS[name], tokens=50, steps=2, loss=1.0, seconds=3.0)


def table(**settings: Any) -> Federate:
    return Federate(**{"merge": "mean", "rounds": 9, "quorum": 0.5, "regulariser": "none", "secure": True, **settings})


class Party:
    """A federation with secure sums.

    Args:
        folder: Where the clients note what they revealed, and answers are spooled.
        names: The clients.
        make: Name and round → the client's update.
        settings: Of the table [federate].
    """

    def __init__(
        self,
        folder: Path,
        names: tuple[str, ...] = NAMES,
        make: Callable[[str, int], Tensors] = update,
        **settings: Any,
    ) -> None:
        self.folder, self.names, self.make, self.settings = folder, names, make, table(**settings)
        self.server = Coordinator(names, PHI, self.settings)
        self.identities = drawn(names)
        self.clients = {name: self.started(name) for name in names}
        self.faults: list[tuple[str, Step, str]] = []

    def started(self, name: str) -> SecureClient:
        """A client's process, new, over the folder of the one before."""
        return SecureClient(
            self.identities[name], Form.of(self.settings), digest(PHI), ROWS[name], self.folder / "clients" / name
        )

    def resume(self, closed: Closed, records: list[Mapping[str, Any]]) -> None:
        """Start the server anew from what is stored of its rounds."""
        self.server = Coordinator(
            self.names,
            closed.adapter,
            self.settings,
            conflict=closed.conflict or None,
            server_state=closed.server_state or None,
            records=records,
            start=PHI,
        )

    def answer(self, name: str, order: Order) -> Answer:
        """What a client says to an order that came over the wire."""
        data = encode_order(order)
        assert len(data) <= order_limit(PHI, secure=True)
        order = decode_order(data)
        client = self.clients[name]
        try:
            if order.kind == "sum":
                return client.told(order, order.ask)
            return client.masked(order, order.ask, reply(name, order, self.make(name, order.round)))
        except FedproxyError as error:
            return Refusal(name, order.round, str(error))

    def carried(self, name: str, order: Order, said: Answer) -> Answer:
        """An answer as it comes to the server."""
        data = encode_reply(said)
        assert len(data) <= reply_limit(order)
        spool = self.folder / "spool"
        spool.mkdir(parents=True, exist_ok=True)
        return take_reply(data, spool / name, order, name)

    def round(
        self,
        *,
        there: tuple[str, ...] | None = None,
        gone: Mapping[str, Step] = {},
        change: Callable[[str, Step, Answer], Answer] = lambda name, step, said: said,
        seen: Callable[[], None] = lambda: None,
    ) -> Closed:
        """A round.

        Args:
            there: Who is there when it begins; all if none.
            gone: Client → the step in which it vanishes.
            change: What comes to the server in place of an answer.
            seen: Called after each answer and each step.
        """
        self.server.begin(self.names if there is None else there)
        lost: set[str] = set()
        while True:
            for name in self.server.asked:
                order = self.server.order(name)
                step = (order.ask.step, order.ask.label)
                lost |= {name} if gone.get(name) == step else set()
                if name in lost:
                    continue
                said = change(name, step, self.carried(name, order, self.answer(name, order)))
                if fault := self.server.receive(name, said):
                    self.faults.append((name, step, fault))
                seen()
            more = self.server.advance()
            seen()
            if not more:
                return self.server.close()
