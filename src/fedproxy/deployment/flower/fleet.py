"""What the gateway lets through to Flower's Fleet API, client by client.

The Fleet API believes what a node writes: whose reply a message is, which objects are its own. Here each client is held
to its node, to the order that it got, and to as many bytes as an answer takes. Flower's clients ask again and again for
what is not there yet; here such a question is held until it is.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from google.protobuf.message import DecodeError

from fedproxy.deployment.flower import PART_BYTES
from fedproxy.deployment.flower.announced import Announced
from fedproxy.deployment.flower.requests import Ask, RefusedError, Said

HOLD_SECONDS = 20.0
"""How long a question is held. Flower's clients give up after 30 s."""
OBJECT_PAUSE = 0.03
LOOKS = 50
"""How often between two questions to the SuperLink it is looked whether orders were sent."""
DELIVERIES = 3
"""So often an order is delivered whose arrival was not confirmed: the answer to a question may be lost on its way."""
HEAD_BYTES, PART_HEAD_BYTES = 64 << 10, 256
"""What an answer may take beyond its content, and what each of its parts: the heads of Flower's objects."""
SUPERLINK_NODE = 1
_PLAIN = ("send-node-heartbeat", "get-run", "get-fab")


@dataclass
class _Upload:
    """An answer on its way: what of it the SuperLink has still to get, and what of it is known."""

    message: str
    said: Said
    missing: set[str]
    parts: set[str]
    left: int


@dataclass
class _Order:
    """An order that was delivered, as it was."""

    identifier: str
    run: int
    said: Said
    parts: set[str]
    deliveries: int = 1
    confirmed: bool = False
    upload: _Upload | None = None


@dataclass
class _Node:
    """What is known of a client's SuperNode."""

    number: int = 0
    order: _Order | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Fleet:
    """The requests of clients to the Fleet API.

    Args:
        announced: Where it is announced what became of an order.
        most: Bytes that an answer takes at most.
        pause: Seconds between two questions to the SuperLink for a client's orders, unless some were sent meanwhile.
    """

    def __init__(self, announced: Announced, most: int, pause: float) -> None:
        self._announced, self._pause = announced, pause
        self._most = most + HEAD_BYTES + most // PART_BYTES * PART_HEAD_BYTES
        self._objects = 64 + 4 * (self._most // PART_BYTES)
        self._nodes: dict[str, _Node] = {}
        self._lock = threading.Lock()

    def handle(self, key: str, name: str, body: bytes, ask: Ask, alive: Callable[[], bool]) -> Said:
        """Answer a request.

        Args:
            key: Whose it is: a public key, PEM.
            name: What is asked.
            body: The request.
            ask: Asks the SuperLink.
            alive: Whether the client still waits for the answer.

        Raises:
            RefusedError: it is not for this client.
        """
        with self._lock:
            node = self._nodes.setdefault(key, _Node())
        if name in ("register-node", "activate-node"):
            return self._enter(node, key, name, body, ask)
        if name in ("deactivate-node", "unregister-node"):
            kind = DeactivateNodeRequest if name == "deactivate-node" else UnregisterNodeFleetRequest
            self._check_node(node, _parsed(kind, body).node_id)
            return ask(name, body)
        if name == "pull-messages":
            return self._pull_messages(node, body, ask, alive)
        if name == "pull-object":
            return self._pull_object(node, body, ask, alive)
        if name == "confirm-message-received":
            return self._confirm(node, body, ask)
        if name == "push-messages":
            return self._push_messages(node, body, ask)
        if name == "push-object":
            return self._push_object(node, body, ask)
        if name in _PLAIN:
            return ask(name, body)
        raise RefusedError("clients have no use for it")

    def leave(self, key: str) -> None:
        """Say that who had this key will not answer with it any more."""
        with self._lock:
            node = self._nodes.pop(key, None)
        if node is not None:
            with node.lock:
                self._lose(node, "its key is another one now, or was revoked")

    def _enter(self, node: _Node, key: str, name: str, body: bytes, ask: Ask) -> Said:
        kind = RegisterNodeFleetRequest if name == "register-node" else ActivateNodeRequest
        if _parsed(kind, body).public_key != key.encode():
            raise RefusedError("a SuperNode enters with its own key")
        said = ask(name, body)
        if name == "activate-node" and said.status != HTTPStatus.OK and node.number:
            # It was killed, and the SuperLink holds it for online until its heartbeats have been missed.
            ask("deactivate-node", DeactivateNodeRequest(node_id=node.number).SerializeToString())
            said = ask(name, body)
        if name == "activate-node" and said.status == HTTPStatus.OK:
            with node.lock:
                node.number = ActivateNodeResponse.FromString(said.content).node_id
                if node.order is not None and node.order.confirmed:
                    self._lose(node, "its SuperNode was started anew before it answered")
        return said

    def _check_node(self, node: _Node, number: int) -> None:
        if not number or number != node.number:
            raise RefusedError("this is another SuperNode's number")

    def _lose(self, node: _Node, reason: str) -> None:
        if node.order is not None:
            self._announced.announce(node.order.identifier, reason)
            node.order = None

    def _pull_messages(self, node: _Node, body: bytes, ask: Ask, alive: Callable[[], bool]) -> Said:
        self._check_node(node, _parsed(PullMessagesRequest, body).node.node_id)
        with node.lock:
            if node.order is not None and (node.order.confirmed or node.order.deliveries >= DELIVERIES):
                self._lose(node, "its SuperNode gave its order up")
        until, nothing = time.monotonic() + HOLD_SECONDS, Said(HTTPStatus.OK, b"")
        while alive():  # a message that is asked for counts as delivered
            sent = self._announced.sent
            with node.lock:
                if (order := node.order) is not None:
                    order.deliveries += 1
                    return order.said
                said = ask("pull-messages", body)
                found = PullMessagesResponse.FromString(said.content if said.status == HTTPStatus.OK else b"")
                if found.messages_list:
                    head, parts = found.messages_list[0].metadata, _identifiers(found.message_object_trees[0])
                    node.order = _Order(head.message_id, head.run_id, said, set(parts))
            if said.status != HTTPStatus.OK or found.messages_list:
                return said
            if time.monotonic() > until:
                break
            nothing, again = said, time.monotonic() + self._pause
            while self._announced.sent == sent and time.monotonic() < again:
                time.sleep(self._pause / LOOKS)
        return nothing

    def _pull_object(self, node: _Node, body: bytes, ask: Ask, alive: Callable[[], bool]) -> Said:
        request = _parsed(PullObjectRequest, body)
        self._check_node(node, request.node.node_id)
        order = node.order
        if order is None or request.object_id not in order.parts:
            raise RefusedError("it is no part of an order to this client")
        until = time.monotonic() + HOLD_SECONDS
        while True:
            said = ask("pull-object", body)
            if said.status != HTTPStatus.OK:
                return said
            found = PullObjectResponse.FromString(said.content)
            if found.object_available or not found.object_found or time.monotonic() > until or not alive():
                return said
            time.sleep(OBJECT_PAUSE)

    def _confirm(self, node: _Node, body: bytes, ask: Ask) -> Said:
        request = _parsed(ConfirmMessageReceivedRequest, body)
        self._check_node(node, request.node.node_id)
        if node.order is None or request.message_object_id != node.order.identifier:
            raise RefusedError("it is no order to this client")
        said = ask("confirm-message-received", body)
        if said.status == HTTPStatus.OK:
            node.order.confirmed = True
        return said

    def _push_messages(self, node: _Node, body: bytes, ask: Ask) -> Said:
        request = _parsed(PushMessagesRequest, body)
        self._check_node(node, request.node.node_id)
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise RefusedError("an answer is one message")
        head, tree = request.messages_list[0].metadata, request.message_object_trees[0]
        with node.lock:
            order = node.order
            if order is None or head.reply_to_message_id != order.identifier or head.run_id != order.run:
                raise RefusedError("nobody asked this client for it")
            if head.src_node_id != node.number or head.dst_node_id != SUPERLINK_NODE:
                raise RefusedError("an answer names its own sender, and goes to the server")
            if order.upload is not None and order.upload.message == head.message_id:
                return order.upload.said  # asked again, since the answer was lost on its way
            parts = set(_identifiers(tree, self._objects))
            said = ask("push-messages", body)
            if said.status == HTTPStatus.OK:
                taken = PushMessagesResponse.FromString(said.content)
                order.upload = _Upload(head.message_id, said, set(taken.objects_to_push), parts, self._most)
                self._finish(node)
            return said

    def _push_object(self, node: _Node, body: bytes, ask: Ask) -> Said:
        request = _parsed(PushObjectRequest, body)
        self._check_node(node, request.node.node_id)
        with node.lock:
            upload = node.order.upload if node.order is not None else None
            if upload is None or request.object_id not in upload.parts:
                raise RefusedError("it is no part of an answer that was asked for")
            if request.object_id not in upload.missing:
                return Said(HTTPStatus.OK, PushObjectResponse(stored=True).SerializeToString())
            if len(request.object_content) > upload.left:
                self._lose(node, f"its answer takes more than {self._most} bytes")
                raise RefusedError("the answer is larger than any that was asked for")
            said = ask("push-object", body)
            if said.status == HTTPStatus.OK and PushObjectResponse.FromString(said.content).stored:
                upload.missing.discard(request.object_id)
                upload.left -= len(request.object_content)
                self._finish(node)
            return said

    def _finish(self, node: _Node) -> None:
        if node.order is not None and node.order.upload is not None and not node.order.upload.missing:
            self._announced.announce(node.order.identifier)
            node.order = None


def _parsed(kind: Any, body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise RefusedError(f"it is no {kind.__name__}") from error


def _identifiers(tree: ObjectTree, most: int | None = None) -> list[str]:
    """The identifiers of an object and all that it is made of."""
    found, left = [], [tree]
    while left:
        one = left.pop()
        found.append(one.object_id)
        left.extend(one.children)
        if most is not None and len(found) + len(left) > most:
            raise RefusedError(f"an answer has at most {most} parts")
    return found
