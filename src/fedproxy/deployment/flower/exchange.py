"""Orders and answers over Flower's Grid, for simulation and deployment alike."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedproxy.errors import ResourceError, UsageError, explained
from fedproxy.federation.messages import Order, Refusal, Reply
from fedproxy.federation.protocol import encode_order, take_reply
from fedproxy.federation.wire import PLAIN

ORDER = "fedproxy.order"
ANSWER = "fedproxy.answer"
TO = "fedproxy.to"

POLL_SECONDS = 0.1
PUSHED_AT_ONCE = 16
PULLED_AT_ONCE = 4
"""Answers in memory at a time: each is on disk before the next ones are fetched."""

PRESENCE_SECONDS = 5.0
"""How often it is looked whether the clients that still owe an answer are there."""

FOREVER = 30 * 24 * 3600.0
"""Seconds that a message lives where there is no deadline: Flower's messages must end."""


def pack(key: str, data: bytes) -> RecordDict:
    """Bytes as the content of a Flower message; Flower sends them in chunks, and the same bytes once."""
    return RecordDict({key: ArrayRecord({"bytes": Array("uint8", (len(data),), "fedproxy.bytes", data)})})


def unpack(content: RecordDict, key: str) -> bytes:
    """The bytes that `pack` put into a message.

    Raises:
        ValueError: the message holds something else.
    """
    record = content.get(key)
    if not isinstance(record, ArrayRecord) or list(record) != ["bytes"]:
        raise ValueError(f"the message holds no {key}")
    return bytes(record["bytes"].data)


class GridExchange:
    """An `Exchange` over a Grid.

    Args:
        grid: Flower's connection to the nodes.
        nodes: Tells the clients that are connected: name → Flower's node id.
        spool: Makes the empty folder in which the answers of an order are kept until the round is stored.
        wire: The encoding of updates.
        options: Its options.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Callable[[], Mapping[str, int]],
        spool: Callable[[], Path],
        wire: str = PLAIN,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._grid, self._nodes, self._spool, self._wire = grid, nodes, spool, (wire, options)
        self._late: dict[str, tuple[str, int]] = {}

    def available(self) -> Sequence[str]:
        """Names of the clients that are connected."""
        return sorted(self._nodes())

    def ask(self, orders: Mapping[str, Order], deadline: float | None) -> Iterator[tuple[str, Reply | Refusal]]:
        """Send each client its order and yield what comes back, late answers to earlier orders among it."""
        folder, nodes, number = self._spool(), self._nodes(), next(iter(orders.values())).round
        for name in orders:
            if name not in nodes:
                yield name, Refusal(name, number, "it left before the order was sent")
        asked = {name: order for name, order in orders.items() if name in nodes}
        until = None if deadline is None else time.monotonic() + deadline
        waiting: dict[str, str] = {}
        for identifier, name in self._pushed(asked, nodes, FOREVER if deadline is None else deadline + 60.0):
            if identifier:
                waiting[identifier] = name
            else:
                yield name, Refusal(name, number, "Flower did not take its order")
        looked = time.monotonic()
        while waiting and (until is None or time.monotonic() < until):
            idle = True
            for identifier, answer in self._pulled([*waiting, *self._late]):
                idle = False
                path = folder / f"{identifier[:16]}.safetensors"
                if identifier in waiting:
                    name = waiting.pop(identifier)
                    yield name, self._read(answer, path, orders[name], name)
                    continue
                name, asked_in = self._late.pop(identifier, ("", 0))
                if not name or answer.has_error():  # nobody was asked that, or it says nothing of this round's order
                    continue
                if asked_in == number and name in orders:  # the round was begun again
                    yield name, self._read(answer, path, orders[name], name)
                else:
                    yield name, Refusal(name, asked_in, "it came after its round")
            if idle:
                if time.monotonic() - looked > PRESENCE_SECONDS:
                    looked, present = time.monotonic(), self._nodes()
                    for identifier, name in list(waiting.items()):
                        if name not in present:
                            del waiting[identifier]
                            self._late[identifier] = name, number
                            yield name, Refusal(name, number, "it left before it answered")
                time.sleep(POLL_SECONDS)
        self._late |= {identifier: (name, number) for identifier, name in waiting.items()}

    def _pushed(self, orders: Mapping[str, Order], nodes: Mapping[str, int], life: float) -> Iterator[tuple[str, str]]:
        """Send the orders, and yield the identifier of each message and whom it went to."""
        clients = sorted(orders, key=lambda name: (id(orders[name]), name))
        encoded: tuple[Order, RecordDict] | None = None
        for begin in range(0, len(clients), PUSHED_AT_ONCE):
            group, messages = clients[begin : begin + PUSHED_AT_ONCE], []
            for name in group:
                order = orders[name]
                if encoded is None or encoded[0] is not order:
                    encoded = order, pack(ORDER, encode_order(order))
                content = RecordDict({ORDER: encoded[1][ORDER], TO: ConfigRecord({"client": name})})
                messages.append(Message(content, nodes[name], "train", ttl=life, group_id=str(order.round)))
            yield from zip(self._grid.push_messages(messages), group, strict=True)

    def _pulled(self, identifiers: Sequence[str]) -> Iterator[tuple[str, Message]]:
        for begin in range(0, len(identifiers), PULLED_AT_ONCE):
            for answer in self._grid.pull_messages(identifiers[begin : begin + PULLED_AT_ONCE]):
                yield answer.metadata.reply_to_message_id, answer

    def _read(self, answer: Message, path: Path, order: Order, sender: str) -> Reply | Refusal:
        if answer.has_error():
            return Refusal(sender, order.round, answer.error.reason or f"Flower's error {answer.error.code}")
        try:
            return take_reply(unpack(answer.content, ANSWER), path, order, sender, *self._wire)
        except (UsageError, ResourceError):
            raise  # this machine's disk
        except Exception as error:
            if isinstance(known := explained(error), ResourceError):
                raise known from error
            # whatever else it is, this client sent it
            return Refusal(sender, order.round, f"it cannot be read: {type(error).__name__}: {error}", "invalid")
