"""Orders and answers over Flower's Grid, for simulation and deployment alike."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedproxy.deployment.flower.announced import Announced
from fedproxy.errors import ResourceError, UsageError, explained
from fedproxy.federation.messages import Answer, Order, Refusal
from fedproxy.federation.protocol import encode_order, take_reply
from fedproxy.federation.wire import PLAIN

ORDER = "fedproxy.order"
ANSWER = "fedproxy.answer"
TO = "fedproxy.to"
OFFER, LISTING, PARTS, READY = "fedproxy.offer", "fedproxy.listing", "fedproxy.parts", "fedproxy.ready"
"""Of the introduction of a stock SuperNode: what it is sent, and what it says."""

POLL_SECONDS, LOOK_SECONDS = 0.1, 0.03
"""How often Flower is asked for answers, or looked at what is announced."""
PUSHED_AT_ONCE = 16

PRESENCE_SECONDS = 5.0
"""How often it is looked whether the clients that still owe an answer are there."""

FOREVER = 30 * 24 * 3600.0
"""Seconds that a message lives where there is no deadline: Flower's messages must end."""


def record(entries: Mapping[str, bytes]) -> ArrayRecord:
    """Bytes as a record of a Flower message; Flower sends them in chunks, and the same bytes once."""
    return ArrayRecord({key: Array("uint8", (len(data),), "fedproxy.bytes", data) for key, data in entries.items()})


def pack(key: str, data: bytes) -> RecordDict:
    """Bytes as the content of a Flower message."""
    return RecordDict({key: record({"bytes": data})})


def unpack(content: RecordDict, key: str) -> bytes:
    """The bytes that `pack` put into a message.

    Raises:
        ValueError: the message holds something else.
    """
    record = content.get(key)
    if not isinstance(record, ArrayRecord) or list(record) != ["bytes"]:
        raise ValueError(f"the message holds no {key}")
    return bytes(record["bytes"].data)


def answer_to(grid: Grid, identifier: str) -> Message | None:
    """The answer to a message; nothing so far. Asked for alone, whatever is wrong with it is its sender's."""
    pulled = grid.pull_messages([identifier])
    return next((answer for answer in pulled if answer.metadata.reply_to_message_id == identifier), None)


class GridExchange:
    """An `Exchange` over a Grid.

    An answer is fetched by its own order's identifier alone, so that whatever is wrong with it is known to be its
    sender's.

    Args:
        grid: Flower's connection to the nodes.
        nodes: Tells the clients that are connected: name → Flower's node id.
        spool: Makes the empty folder in which the answers of an order are kept until the round is stored.
        wire: The encoding of updates.
        options: Its options.
        announced: What the gateway announces; without a gateway all that is waited for is asked for again and again.
        offers: What was offered to clients whose processes end after each answer, which is sent along: name → offer.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Callable[[], Mapping[str, int]],
        spool: Callable[[], Path],
        wire: str = PLAIN,
        options: Mapping[str, Any] | None = None,
        *,
        announced: Announced | None = None,
        offers: Mapping[str, str] | None = None,
    ) -> None:
        self._grid, self._nodes, self._spool, self._wire = grid, nodes, spool, (wire, options)
        self._announced, self._offers = announced, offers or {}
        self._late: dict[str, tuple[str, int, str]] = {}

    def available(self) -> Sequence[str]:
        """Names of the clients that are connected."""
        return sorted(self._nodes())

    def ask(self, orders: Mapping[str, Order], deadline: float | None) -> Iterator[tuple[str, Answer]]:
        """Send each client its order and yield what comes back, late answers to earlier orders among it."""
        one = next(iter(orders.values()))
        folder, nodes, number, what = self._spool(), self._nodes(), one.round, one.what
        for name in orders:
            if name not in nodes:
                yield name, Refusal(name, number, "it left before the order was sent")
        asked = {name: order for name, order in orders.items() if name in nodes}
        until = None if deadline is None else time.monotonic() + deadline
        waiting: dict[str, str] = {}
        for identifier, name in self._pushed(asked, nodes, FOREVER if deadline is None else deadline + 60.0):
            if identifier:
                waiting[identifier] = name
                if self._announced is not None:
                    self._announced.send()
            else:
                yield name, Refusal(name, number, "Flower did not take its order")
        looked = time.monotonic()
        while waiting and (until is None or time.monotonic() < until):
            idle = True
            for identifier in [*waiting, *self._late]:
                now = identifier in waiting
                name, asked_in, asked_for = (waiting[identifier], number, what) if now else self._late[identifier]
                if (answer := self._fetched(identifier, name, asked_in)) is None:
                    continue
                idle = False
                path = folder / f"{identifier[:16]}.safetensors"
                if waiting.pop(identifier, None) is not None:
                    yield name, self._read(answer, path, orders[name], name, nodes[name])
                    continue
                del self._late[identifier]
                other = asked_in == number and asked_for != what  # of a step of the round that is over
                if other or isinstance(answer, Refusal) or answer.has_error():  # it says nothing of this order
                    continue
                if asked_in == number and name in orders:  # the order was sent again
                    yield name, self._read(answer, path, orders[name], name, nodes.get(name))
                else:
                    yield name, Refusal(name, asked_in, "it came after its round")
            if idle:
                if time.monotonic() - looked > PRESENCE_SECONDS:
                    looked, present = time.monotonic(), self._nodes()
                    for identifier, name in list(waiting.items()):
                        if name not in present:
                            del waiting[identifier]
                            self._late[identifier] = name, number, what
                            yield name, Refusal(name, number, "it left before it answered")
                time.sleep(POLL_SECONDS if self._announced is None else LOOK_SECONDS)
        self._late |= {identifier: (name, number, what) for identifier, name in waiting.items()}

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
                to = ConfigRecord({"client": name, "offer": self._offers.get(name, "")})
                content = RecordDict({ORDER: encoded[1][ORDER], TO: to})
                messages.append(Message(content, nodes[name], "train", ttl=life, group_id=str(order.round)))
            yield from zip(self._grid.push_messages(messages), group, strict=True)

    def _fetched(self, identifier: str, name: str, number: int) -> Message | Refusal | None:
        """What came in answer to an order, or in its place; nothing so far."""
        if self._announced is not None:
            done = self._announced.done(identifier)
            if done is None:
                return None
            if done:
                return Refusal(name, number, done)
        try:
            answer = answer_to(self._grid, identifier)
        except httpx.HTTPError:
            raise  # the SuperLink is away
        except Exception as error:
            return unreadable(error, name, number)
        if answer is None and self._announced is not None:
            return Refusal(name, number, "Flower did not take its answer")
        return answer

    def _read(self, answer: Message | Refusal, path: Path, order: Order, sender: str, node: int | None) -> Answer:
        if isinstance(answer, Refusal):
            return answer
        if answer.has_error():
            return Refusal(sender, order.round, answer.error.reason or f"Flower's error {answer.error.code}")
        if node is not None and answer.metadata.src_node_id != node:
            return Refusal(sender, order.round, "the answer names another sender", "invalid")
        try:
            return take_reply(unpack(answer.content, ANSWER), path, order, sender, *self._wire)
        except (UsageError, ResourceError):
            raise  # this machine's disk
        except Exception as error:
            return unreadable(error, sender, order.round)


def unreadable(error: Exception, sender: str, number: int) -> Refusal:
    """Whatever is wrong with an answer, its sender sent it; but for want of memory here, which is raised."""
    if isinstance(known := explained(error), ResourceError):
        raise known from error
    return Refusal(sender, number, f"it cannot be read: {type(error).__name__}: {error}", "invalid")
