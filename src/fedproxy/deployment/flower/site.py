"""A data owner on a stock SuperNode: what its node's configuration says, and how its ClientApp answers.

Flower starts a process for every message there. So each is answered from what came with it and from the cache, and
nothing of a session stays but what a client remembers on disk, and how often a round was ordered, in Flower's context.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedproxy.config import Client, Evaluate, Rule, table
from fedproxy.deployment.flower.exchange import ANSWER, LISTING, OFFER, ORDER, PARTS, READY, TO, pack, unpack
from fedproxy.deployment.handout.fetch import default_cache, find_proxy, take_parts
from fedproxy.errors import ArtifactError, FederationError, ResourceError, UsageError
from fedproxy.federation.client_rows import Rows, parted_rows, rows_of
from fedproxy.federation.offer import Limits, Offer, check_offer
from fedproxy.federation.protocol import is_name
from fedproxy.federation.session import Session
from fedproxy.models.training import optimizer_steps

_AUTHORITY = "flower"
"""Below the cache's clients/, in the place of a CA's hash: which server it is, Flower knows."""
_ORDERED = "fedproxy.ordered"
_WRONG: dict[type[Exception], str] = {
    UsageError: "its node config or cache cannot be used",
    ArtifactError: "its data, its cache, or what the server sent cannot be used",
    ResourceError: "its disk or memory does not suffice",
}


@table
class Site:
    """What a SuperNode's `--node-config` says.

    Attributes:
        client: The client's name in the experiment.
        data: Its rows (JSON Lines); with `task` the folder of its data.
        task: A task of the LM evaluation harness instead of a file of rows.
        validation: File of rows to score on, in place of a part of its data; "" for such a part.
        scores: Whether it scores adapters at all.
        cache: Where proxies are kept, and what the client remembers; "" for the same place as `fedproxy join`.
        limits: What it allows: keys of the names of `Limits`.
    """

    client: Annotated[str, Rule("a client's name", is_name)]
    data: str = ""
    task: str = ""
    validation: str = ""
    scores: bool = True
    cache: str = ""
    limits: Limits = field(default_factory=Limits)

    @staticmethod
    def of(config: Mapping[str, Any]) -> "Site":
        """Read a node's configuration.

        Raises:
            ConfigError: a key is missing or unknown, or a value is impossible.
        """
        limits = {limit.name for limit in fields(Limits)} & config.keys()
        own = {key: value for key, value in config.items() if key not in limits}
        return Site(**{"client": "", **own}, limits=Limits(**{key: config[key] for key in limits}))

    @property
    def folder(self) -> Path:
        """The cache."""
        return Path(self.cache).expanduser() if self.cache else default_cache()

    def rows(self, offer: Offer) -> tuple[Rows, Rows]:
        """The rows that an offer would train on, and those to score on; errors as of `rows_of`."""
        data = "" if self.data == "" else str(Path(self.data).expanduser())
        client = Client(self.client, "" if self.task else data, self.task, offer.max_rows)
        rows = rows_of(client, Evaluate(data=data if self.task else ""), offer.seed)
        file = str(Path(self.validation).expanduser()) if self.validation else ""
        share = offer.federate.validation
        return parted_rows(rows, share, offer.seed, self.client, file=file, scores=self.scores)

    def session(self, offer: Offer) -> Session:
        """A session that can answer an order of this offer.

        Raises:
            FederationError: the proxy is not in the cache, or the limits forbid what is offered.
            ArtifactError: data or proxy cannot be used.
        """
        proxy = find_proxy(offer.proxy, self.folder)
        if proxy is None:
            raise FederationError("the proxy is not in this client's cache: start its SuperNode anew to get it again")
        session = Session.open(proxy, offer, self.limits, state=self.folder / "clients" / _AUTHORITY / offer.id)
        session.take_rows(self.client, *self.rows(offer))
        return session


def introduce(message: Message, context: Context) -> Message:
    """Say who this is.

    Raises:
        FederationError: why it takes no part.
    """
    with _discreet():
        return Message(
            RecordDict({READY: ConfigRecord({"client": Site.of(context.node_config).client})}), reply_to=message
        )


def consider(message: Message, context: Context) -> Message:
    """Check an offer by this client's limits, take the parts of the proxy that came with it, and say which are missing.

    Raises:
        FederationError: why it takes no part.
    """
    with _discreet():
        site, offer = Site.of(context.node_config), Offer.decode(str(message.content[OFFER]["offer"]))
        rows = len(site.rows(offer)[0])
        check_offer(offer, site.limits, rows=rows, steps=optimizer_steps(rows, offer.train))
        came = message.content[PARTS]
        assert isinstance(came, ArrayRecord)
        parts = {sha256: bytes(part.data) for sha256, part in came.items()}
        listing = unpack(message.content, LISTING)
        missing = take_parts(listing, parts, offer.proxy, site.folder, site.limits.max_download)
        return Message(RecordDict({READY: ConfigRecord({"rows": rows, "missing": missing})}), reply_to=message)


def train(message: Message, context: Context) -> Message:
    """Answer an order.

    Raises:
        FederationError: what of this client's own makes that impossible.
    """
    with _discreet():
        site, order = Site.of(context.node_config), unpack(message.content, ORDER)
        session = site.session(Offer.decode(str(message.content[TO]["offer"])))
        if len(order) > session.order_limit:
            raise FederationError(f"an order of {len(order)} bytes came, {session.order_limit} are the most")
        ordered: Any = context.state.get(_ORDERED, {})
        for what, times in ordered.items():
            kind, _, number = what.partition(" ")
            session.orders[site.client, kind, int(number)] = times
        answer, _, fault = session.answer(site.client, order)
        counts: Any = {f"{kind} {number}": times for (_, kind, number), times in session.orders.items()}
        context.state[_ORDERED] = ConfigRecord(counts)
        if fault is not None and not isinstance(fault, FederationError):
            raise fault
        return Message(pack(ANSWER, answer), reply_to=message)


@contextlib.contextmanager
def _discreet() -> Iterator[None]:
    """Let an error tell the server nothing of this machine; Flower logs it here with its cause, in full."""
    try:
        yield
    except FederationError:
        raise
    except Exception as error:
        wrong = next((text for kind, text in _WRONG.items() if isinstance(error, kind)), "it failed")
        raise FederationError(f"{wrong}; its own log says why") from error
