"""The owner's side on a stock SuperLink: nodes are asked who they are, and are brought what they lack of the proxy.

Nothing waits for a node: whoever asks who is there moves each introduction on by a step.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedproxy.adapter_files import read_adapter
from fedproxy.artifacts import write_json
from fedproxy.config import Experiment
from fedproxy.deployment.flower.exchange import LISTING, OFFER, PARTS, READY, answer_to, record, unreadable
from fedproxy.deployment.handout.parts import PART_BYTES, Listing, describe, opened
from fedproxy.deployment.members import read_members
from fedproxy.deployment.serving import run_identity
from fedproxy.errors import FederationError, UsageError
from fedproxy.federation.offer import make_offer
from fedproxy.federation.protocol import is_name
from fedproxy.federation.tuning import START
from fedproxy.foreign import plain
from fedproxy.run_directory import MEMBERS, RunDirectory
from fedproxy.tensors import digest

log = logging.getLogger(__name__)

ANSWER_SECONDS = 1800.0
"""How long a node may take to answer: it may read a task first."""
MESSAGE_BYTES = PART_BYTES
"""A message holds as many parts of the proxy as have so many bytes together, and one at least."""
_MOST_ROWS = 1 << 53
_RAISED = re.compile(r"<class '[\w.]+'>:<'(.*)'>", re.DOTALL)
"""An exception of a ClientApp, as Flower reports it."""


def check_clients(experiment: Experiment) -> None:
    """Check that an experiment says which clients take part.

    Raises:
        UsageError: it names none, or has secure sums.
    """
    if experiment.federate.secure:
        raise UsageError(
            "[federate] secure = true needs clients that hold their keys between two messages, and a stock SuperNode "
            "starts a process for each. Let clients join with fedproxy join, or set secure = false."
        )
    if not experiment.client:
        raise UsageError(
            "Clients on stock SuperNodes are known by their names alone: name all in [[client]] tables, each as its "
            "SuperNode's --node-config does."
        )


@dataclass(eq=False)
class _Node:
    """A node and its introduction, which yields what to ask it, and is sent what it said.

    Attributes:
        id: Flower's number of it.
        public_key: Its SuperNode's, PEM.
        steps: What is left of its introduction; none once it is ready, or refused.
        name: The client that it says it is.
        waits: The identifier of the message that it owes an answer to.
    """

    id: int
    public_key: str
    steps: "_Steps | None" = None
    name: str = ""
    waits: str = ""


_Steps = Generator[tuple[str, RecordDict] | None, Mapping[str, Any] | None, None]


class Introductions:
    """The nodes of a stock SuperLink by the names that they give themselves.

    Args:
        grid: Flower's connection to the nodes.
        run: The run directory; RUN/members.json is told who takes part.
        listing: What is handed out of the proxy.
        handles: Its files, open.
        offers: What each client is offered: name → offer.
        on_event: Told `node_ready` (client, rows) and `node_refused` (node, client, reason).
    """

    def __init__(
        self,
        grid: Grid,
        run: Path,
        listing: Listing,
        handles: Mapping[str, int],
        offers: Mapping[str, str],
        on_event: Callable[..., None],
    ) -> None:
        self._grid, self._run, self._listing, self._handles, self._on_event = grid, run, listing, handles, on_event
        self._parts = {part.sha256: (file.name, part) for file in listing.files for part in file.parts}
        self._nodes: dict[tuple[int, str], _Node] = {}
        self._holders: dict[str, _Node] = {}
        self.offers = offers

    @staticmethod
    @contextlib.contextmanager
    def begun(grid: Grid, experiment: Experiment, directory: RunDirectory) -> Iterator["Introductions"]:
        """The introductions of a run, its proxy and RUN/start written; errors as of `describe`."""
        run = directory.path
        listing, start = describe(run / "proxy"), digest(read_adapter(run / START)[1])
        about: Any = {"run_id": run_identity(run), "proxy": listing.sha256, "start": start}
        kept = replace(
            experiment, federate=replace(experiment.federate, share_result=False)
        )  # Flower sends orders alone
        offers = {client.name: make_offer(kept, client.name, **about).encode() for client in experiment.client}
        with opened(run / "proxy") as handles:
            yield Introductions(grid, run, listing, handles, offers, directory.event)

    def ready(self) -> dict[str, int]:
        """The clients that are there and have all they need, after a step of each introduction: name → node id.

        Raises:
            httpx.HTTPError: the SuperLink is away.
        """
        known, self._nodes = self._nodes, {}
        for found in self._grid.get_nodes():
            if found.status == "online":  # a SuperNode that was started anew is asked anew
                key = found.node_id, found.last_activated_at
                self._nodes[key] = known.get(key) or self._met(found)
        there = list(self._nodes.values())
        self._holders = {name: node for name, node in self._holders.items() if node in there}
        for node in there:
            try:
                self._go_on(node)
            except FederationError as error:
                node.steps = None
                self._holders = {name: holder for name, holder in self._holders.items() if holder is not node}
                self._tell(node, str(error))
        return {name: node.id for name, node in self._holders.items() if node.steps is None}

    def _met(self, found: Any) -> _Node:
        node = _Node(found.node_id, found.public_key.decode(errors="replace"))
        node.steps = self._introduced(node)
        return node

    def _tell(self, node: _Node, reason: str) -> None:
        reason = plain(reason, 500)
        log.warning("Node %d%s takes no part: %s", node.id, f" ({node.name})" * bool(node.name), reason)
        self._on_event("node_refused", node=str(node.id), client=node.name, reason=reason)

    def _go_on(self, node: _Node) -> None:
        """Move an introduction on by a step, unless an answer is waited for.

        Raises:
            FederationError: why the node takes no part.
        """
        said = None
        if node.steps is None or (node.waits and (said := self._said(node)) is None):
            return
        node.waits = ""
        try:
            asked = node.steps.send(said)
        except StopIteration:
            node.steps = None
            return
        if asked is not None:
            kind, content = asked
            (identifier,) = self._grid.push_messages([Message(content, node.id, kind, ttl=ANSWER_SECONDS)])
            if not identifier:
                raise FederationError("Flower did not take a message to it")
            node.waits = identifier

    def _introduced(self, node: _Node) -> _Steps:
        """Ask a node who it is, offer it what its client is asked, and send it the parts of the proxy that it lacks."""
        said = yield "query", RecordDict()
        assert said is not None
        name = said.get("client")
        if not is_name(name) or name not in self.offers:
            raise FederationError(f"{name!r:.80} is no client of this experiment: {', '.join(sorted(self.offers))}")
        node.name = str(name)
        if self._holders.setdefault(node.name, node) is not node:
            self._tell(node, f"another node is here as {node.name}; it is let in when that one has left")
        while self._holders.setdefault(node.name, node) is not node:
            yield None
        lacks, parts = list(self._parts), dict[str, bytes]()
        while True:
            said = yield "query.offer", self._offer(node.name, parts)
            assert said is not None
            rows, missing = said.get("rows"), said.get("missing")
            if type(rows) is not int or not 0 < rows < _MOST_ROWS:
                raise FederationError(f"it says that it has {rows!r:.40} rows")
            if not isinstance(missing, list) or not {*missing} <= {*lacks}:
                raise FederationError(f"it asks for parts that do not exist, or that it was sent: {missing!r:.200}")
            if not missing:
                break
            asked = {*missing}
            parts = self._read([sha256 for sha256 in lacks if sha256 in asked])
            lacks = [sha256 for sha256 in lacks if sha256 in asked and sha256 not in parts]
        write_json(self._run / MEMBERS, {**read_members(self._run), node.name: node.public_key})
        self._on_event("node_ready", client=node.name, rows=rows)

    def _offer(self, name: str, parts: Mapping[str, bytes]) -> RecordDict:
        return RecordDict(
            {
                OFFER: ConfigRecord({"offer": self.offers[name]}),
                LISTING: record({"bytes": self._listing.content}),
                PARTS: record(parts),
            }
        )

    def _read(self, wanted: Sequence[str]) -> dict[str, bytes]:
        """The first of these parts, as many as go into a message."""
        found, size = dict[str, bytes](), 0
        for sha256 in wanted:
            name, part = self._parts[sha256]
            size += part.length
            if found and size > MESSAGE_BYTES:
                break
            found[sha256] = os.pread(self._handles[name], part.length, part.offset)
        return found

    def _said(self, node: _Node) -> Mapping[str, Any] | None:
        """What a node answered; nothing so far.

        Raises:
            FederationError: it refuses, or its answer cannot be used.
        """
        try:
            answer = answer_to(self._grid, node.waits)
        except httpx.HTTPError:
            raise  # the SuperLink is away
        except Exception as error:
            raise FederationError(unreadable(error, node.name, 1).reason) from error
        if answer is None:
            return None
        if answer.has_error():
            reason = answer.error.reason or f"Flower's error {answer.error.code}"
            raised = _RAISED.fullmatch(reason)
            raise FederationError(raised[1] if raised else reason)
        if answer.metadata.src_node_id != node.id:
            raise FederationError("its answer names another sender")
        said = answer.content.get(READY)
        if not isinstance(said, ConfigRecord):
            raise FederationError("its answer is none of fedproxy's")
        return dict(said)
