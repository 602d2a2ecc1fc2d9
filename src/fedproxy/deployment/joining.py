"""A data owner's side of the engine `deployment`: a warm session that answers the tasks of a SuperNode."""

import contextlib
import hashlib
import json
import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from fedproxy.artifacts import check_output
from fedproxy.config import Client, Evaluate
from fedproxy.deployment.address import Address
from fedproxy.deployment.certificates import check_certificate, load_private, make_key, private_openssh, read_small
from fedproxy.deployment.flower import CLIENT_SETTINGS, prepare, spare_loopback
from fedproxy.deployment.flower.relay import Relay
from fedproxy.deployment.flower.runtime import AGENT_APP, CLIENT_APP, Task
from fedproxy.deployment.flower.supernode import OtherSuperNode, SuperNode
from fedproxy.deployment.handout.fetch import default_cache, fetch_proxy
from fedproxy.deployment.handout.link import BrokenLinkError, Link
from fedproxy.deployment.keys import read_client_key
from fedproxy.deployment.ledger import LEDGER, Ledger
from fedproxy.deployment.peers import check_peers, identity
from fedproxy.deployment.purse import open_purse
from fedproxy.deployment.result import RESULT_CACHE, fetch_result, keeper
from fedproxy.deployment.welcome import FAREWELL, MOST_BYTES, PATH, Verdict, Welcome, introduce, public_pem
from fedproxy.errors import ArtifactError, FederationError, FedproxyError, ResourceError, UsageError, told
from fedproxy.federation.client_rows import parted_rows, rows_of
from fedproxy.federation.messages import Answer, Refusal, Reply, Scored, Told
from fedproxy.federation.offer import Limits, check_offer
from fedproxy.federation.session import Session
from fedproxy.federation.wire import ENCODINGS
from fedproxy.foreign import plain
from fedproxy.models.training import optimizer_steps

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
SUPERNODE_SECONDS = 120.0
"""How long a SuperNode may take to start, or be away."""
STATUS_SECONDS = 3.0
"""How often a client asks whether the federation goes on."""
_KINDS: dict[type[Answer], str] = {Reply: "update", Scored: "score", Told: "sum", Refusal: "refusal"}
"""What the ledger calls an answer."""
ANSWER_SECONDS = 5.0
"""How long Flower may take to send an answer on, before a client ends that has given one."""
CLOCK_SECONDS = 3.0
"""A difference of the clocks that is told; by little more the server refuses."""


@dataclass(frozen=True)
class Elsewhere:
    """A SuperNode that somebody else operates.

    Attributes:
        address: Of its Runtime API.
        secret: The file that its `--superexec-auth-secret-file` names; none if it was started without.
        ca: Certificate of the CA that vouches for its Runtime API; none for plaintext.
    """

    address: Address
    secret: Path | None = None
    ca: Path | None = None


@dataclass(frozen=True)
class Joining:
    """What a data owner brings.

    Attributes:
        address: The server's.
        key: Its key file; none for plaintext.
        ca: The CA's certificate, unless it lies in the key file.
        name: Its name, where no key tells it.
        client: Its data: a file or a task, as in a [[client]] table.
        evaluate: Where a task's rows and definition lie, as in [evaluate].
        limits: What it allows.
        cache: Where proxies are kept.
        force: Plaintext beyond loopback is meant.
        trust_remote_code: Let the proxy's own Python code run.
        patience: Seconds that a server which is away is waited for.
        wires: Encodings of updates that it agrees to; plain updates it always sends.
        offer: SHA-256 of the offer that it takes, and of no other; "" takes any that the limits allow.
        supernode: The SuperNode that somebody else operates for it; without one it starts its own.
        out: Where the adapter that the federation ends with is written; none if it is not wanted.
        every_round: Whether it is written after each round, too, as far as this client's orders bring it.
        full_ledger: Whether the ledger keeps what left, and not its hashes alone.
        validation: File of rows to score on, in place of a part of its data; "" for such a part.
        scores: Whether it scores adapters at all.
        peers: File of the other clients' public keys, with which it takes part in secure sums, and in nothing else.
    """

    address: Address
    key: Path | None
    ca: Path | None = None
    name: str = ""
    client: Client = field(default_factory=Client)
    evaluate: Evaluate = field(default_factory=Evaluate)
    limits: Limits = field(default_factory=Limits)
    cache: Path | None = None
    force: bool = False
    trust_remote_code: bool = False
    patience: float = 600.0
    wires: tuple[str, ...] = tuple(ENCODINGS)
    offer: str = ""
    supernode: Elsewhere | None = None
    out: Path | None = None
    every_round: bool = False
    full_ledger: bool = False
    validation: str = ""
    scores: bool = True
    peers: Path | None = None


def look(joining: Joining) -> Welcome:
    """Ask the server what it offers, and leave.

    Raises:
        FederationError: the server cannot be reached, or refuses this client.
        ArtifactError: the key or the offer cannot be used.
        UsageError: plaintext beyond loopback, or no CA.
    """
    spare_loopback()
    with contextlib.closing(Owner(joining, looks=True)) as owner:
        return owner.ask()


def join(
    joining: Joining,
    *,
    on_welcome: Callable[[Welcome], None],
    on_bytes: Callable[[int, int], None],
    on_ready: Callable[[int, int, int], None],
    on_step: Callable[[int, int, int, float], None],
    on_answer: Callable[[Answer, int], None],
    on_refusal: Callable[[str], None],
    on_verdict: Callable[[Verdict], None],
) -> None:
    """Take part in a federation until the server ends it.

    Args:
        joining: What the data owner brings.
        on_welcome: Told the server's welcome.
        on_bytes: Told bytes of the proxy that are there, and in all.
        on_ready: Told rows to train on, rows to score on and steps a round, once the client waits for orders.
        on_step: Told round, step, steps and loss.
        on_answer: Told a reply or a score that went out, and its bytes.
        on_refusal: Told why an order was refused, where the next one may go better.
        on_verdict: Told whether an update counted, once its round has ended.

    Raises:
        FederationError: the server cannot be reached, refuses this client, has another offer than the one that it
            takes, or asks for more or less than it allows.
        ArtifactError: key, data, proxy or what this client remembers cannot be used.
        UsageError: plaintext beyond loopback, or the cache cannot be written.
        ResourceError: the disk is full, or memory does not suffice.
    """
    prepare(CLIENT_SETTINGS)
    if joining.out is not None:
        read = (joining.client.data, joining.validation, joining.key)
        check_output(joining.out, [path for path in read if path], overwrite=joining.every_round)
    with contextlib.closing(Owner(joining, on_verdict)) as owner:
        welcome = owner.ask()
        on_welcome(welcome)
        offer, cache = welcome.offer, owner.cache
        if joining.offer not in ("", offer.sha256):
            raise FederationError(
                f"{joining.address} offers {offer.sha256}, not {joining.offer}, which this client takes."
            )
        if joining.out is not None and not offer.federate.share_result:
            raise FederationError(f"{joining.address} shares no result (share_result = false): join without --out.")
        if welcome.result and joining.out is None:
            owner.farewell()
            raise FederationError(f"The federation at {joining.address} is complete: there is nothing left to do.")
        check_peers(offer, str(joining.address), joining.key, joining.peers)
        identities = (
            {} if joining.peers is None else {welcome.name: identity(welcome.name, owner.private, joining.peers)}
        )
        data = Client(welcome.name, joining.client.data, joining.client.task, offer.max_rows)
        rows, held = parted_rows(
            rows_of(data, joining.evaluate, offer.seed),
            offer.federate.validation,
            offer.seed,
            welcome.name,
            file=joining.validation,
            scores=joining.scores,
        )
        check_offer(offer, joining.limits, rows=len(rows), steps=optimizer_steps(len(rows), offer.train))
        state = cache / "clients" / owner.authority / offer.id
        purse = open_purse(offer, joining.limits, rows, cache, state / welcome.name)
        proxy = fetch_proxy(
            owner.url,
            welcome.token,
            offer.proxy,
            cache,
            owner.ca,
            on_bytes,
            most=joining.limits.max_download,
            on_request=owner.ledger.leaves,
        )
        session = Session.open(proxy, offer, joining.limits, state=state, trust_remote_code=joining.trust_remote_code)
        session.purse, session.identities = purse, identities
        steps = session.take_rows(welcome.name, rows, held)
        keep = None
        if joining.out is not None:
            keep = keeper(joining.out, session, offer, proxy, overwrite=joining.every_round)
        if not welcome.result:
            if joining.every_round and keep is not None:
                session.on_global = keep
            on_ready(len(rows), len(held), steps)
            welcome = _answer_orders(owner, welcome, session, joining.supernode, on_step, on_answer, on_refusal)
        if keep is not None:
            own = state / welcome.name
            keep(None, fetch_result(owner, welcome, session, joining.limits, own))
            shutil.rmtree(own / RESULT_CACHE, ignore_errors=True)
        if welcome.result:
            owner.farewell()


def _answer_orders(
    owner: "Owner",
    welcome: Welcome,
    session: Session,
    supernode: Elsewhere | None,
    on_step: Callable[[int, int, int, float], None],
    on_answer: Callable[[Answer, int], None],
    on_refusal: Callable[[str], None],
) -> Welcome:
    """Answer the orders that come until the federation is complete, and give the server's last word."""
    with (
        tempfile.TemporaryDirectory(prefix="fedproxy-") as folder,
        _node(Path(folder), owner, welcome, supernode) as node,
    ):
        answered = -ANSWER_SECONDS
        asked = heard = time.monotonic()
        try:
            while True:
                if time.monotonic() - asked > STATUS_SECONDS:
                    if (last := owner.last_word(welcome)) is not None:
                        return last
                    asked = time.monotonic()
                node.revive()
                try:
                    task = node.runtime.acquire((CLIENT_APP, AGENT_APP))
                    heard = time.monotonic()
                except ConnectionError as error:  # it is starting, or ending
                    if time.monotonic() - heard > SUPERNODE_SECONDS:
                        raise FederationError(f"the SuperNode does not answer ({error}).") from error
                else:
                    if task is not None:
                        fault = _work(task, welcome.name, session, owner.ledger, on_step, on_answer, on_refusal)
                        answered = time.monotonic()
                        if fault is not None:
                            raise fault
                        continue
                time.sleep(POLL_SECONDS)
        except FedproxyError:
            time.sleep(max(0.0, answered + ANSWER_SECONDS - time.monotonic()))
            raise


@contextlib.contextmanager
def _node(
    folder: Path, owner: "Owner", welcome: Welcome, elsewhere: Elsewhere | None
) -> Iterator[SuperNode | OtherSuperNode]:
    """The SuperNode of this client, started behind a relay unless it is another's."""
    if elsewhere is not None:
        secret = None if elsewhere.secret is None else read_small(elsewhere.secret)
        ca = None if elsewhere.ca is None else check_certificate(read_small(elsewhere.ca), elsewhere.ca)
        with contextlib.closing(OtherSuperNode(str(elsewhere.address), secret, ca)) as other:
            yield other
        return
    key = None if owner.ca is None else public_pem(load_private(owner.private).public_key())
    with contextlib.closing(Relay(folder, owner.link(), owner.ledger.leaves, key)) as relay:
        relay.start()
        here = f"127.0.0.1:{relay.port}"
        if key is None:  # a SuperNode without TLS has a key of its own, and cannot say whose it is
            here = f"{welcome.name}:{welcome.token}@{here}"
        with contextlib.closing(SuperNode(folder, here, relay.ca, owner.private)) as node:
            node.start()
            yield node


def _work(
    task: Task,
    name: str,
    session: Session,
    ledger: Ledger,
    on_step: Callable[[int, int, int, float], None],
    on_answer: Callable[[Answer, int], None],
    on_refusal: Callable[[str], None],
) -> FedproxyError | None:
    """Answer a task of the SuperNode; gives the fault of this client that the next order would meet as well."""
    from fedproxy.deployment.flower.exchange import ANSWER, ORDER, pack, unpack

    try:
        with task.beating():
            order = unpack(task.content(), ORDER)
            if task.kind != CLIENT_APP:
                raise FederationError(f"a client of fedproxy runs no {task.kind}")
            if len(order) > session.order_limit:
                raise FederationError(f"an order of {len(order)} bytes came, {session.order_limit} are the most")
            answer, said, fault = session.answer(name, order, on_step)
        ledger.hands(_KINDS[type(said)], answer)
        task.answer(pack(ANSWER, answer))
    except (FederationError, ValueError) as error:
        with contextlib.suppress(FederationError):
            reason = plain(told(FederationError(str(error))), 500)
            ledger.hands("refusal", reason.encode())
            task.refuse(reason)
        on_refusal(str(error))
        return None
    if isinstance(fault, UsageError | ArtifactError | ResourceError):
        return fault
    if fault is None:
        on_answer(said, len(answer))
    else:
        on_refusal(str(fault))
    return None


class Owner:
    """The server as a client sees it.

    Args:
        joining: What the data owner brings.
        on_verdict: Told whether an update counted, once its round has ended.

    Attributes:
        authority: What tells owners apart that give their runs the same identity: the hash of the CA's certificate.
        cache: Where proxies are kept, and what this client remembers.
        ledger: Where it is noted what leaves this machine for the server.

    Raises:
        ArtifactError: the key, or the ledger, cannot be used.
        UsageError: plaintext beyond loopback, or no CA; or the ledger cannot be written.
    """

    def __init__(
        self,
        joining: Joining,
        on_verdict: Callable[[Verdict], None] = lambda verdict: None,
        *,
        looks: bool = False,
    ) -> None:
        self.address, self._name, self._patience = joining.address, joining.name, joining.patience
        self._wires, self._process = joining.wires, "" if looks else secrets.token_hex(8)
        self.url = f"{'http' if joining.key is None else 'https'}://{joining.address}"
        self.ca: bytes | None = None
        if joining.key is None:
            if not (joining.address.is_loopback or joining.force):
                raise UsageError(
                    f"{joining.address}: without a key nothing is encrypted. Give --key FILE, or add --force if the "
                    "network is your own."
                )
            self.private = private_openssh(make_key())
        else:
            held = read_client_key(joining.key)
            self.ca, self.private = held.ca, held.private_openssh
            if joining.ca is not None:
                self.ca = check_certificate(read_small(joining.ca), joining.ca)
            if self.ca is None:
                raise UsageError(f"{joining.key} holds no CA certificate: give --ca FILE, which the owner sends.")
        self.authority = "no-ca" if self.ca is None else hashlib.sha256(self.ca.strip()).hexdigest()
        self.cache = joining.cache or default_cache()
        self.ledger = Ledger(
            self.cache / "clients" / self.authority / LEDGER, str(self.address), full=joining.full_ledger
        )
        self._link = self.link()
        self._away: float | None = None
        self._on_verdict = on_verdict
        self._verdict: Verdict | None = None

    def close(self) -> None:
        """Close the connection, and the ledger."""
        self._link.close()
        self.ledger.close()

    def link(self) -> Link:
        """A way to the server; each request is in the ledger before it leaves."""
        return Link(self.url, None, self.ca, self.ledger.leaves)

    def farewell(self) -> None:
        """Say that this client has all that it wants, so that the server need not wait for it."""
        with contextlib.suppress(BrokenLinkError, FederationError, ArtifactError):  # it may have ended
            self._introduce(FAREWELL)

    def ask(self) -> Welcome:
        """Introduce this client; where the clocks differ by more than a little, that is told.

        Raises:
            FederationError: the server cannot be reached, or refuses.
        """
        asked = time.time()
        try:
            status, said = self._introduce()
        except BrokenLinkError as error:
            hint = " It speaks TLS if it was started with --keys: then give --key FILE." if self.ca is None else ""
            raise FederationError(
                f"{self.address} cannot be reached: {str(error).rstrip('.')}. Is the server running?{hint}"
            ) from error
        if status != HTTPStatus.OK:
            raise FederationError(f"{self.address} refuses this client: {_reason(said)}")
        welcome = Welcome.decode(said)
        self._hear(welcome.verdict)
        ahead = welcome.ahead(asked, time.time())
        if abs(ahead) > CLOCK_SECONDS:
            where = "ahead of" if ahead > 0 else "behind"
            log.warning("This clock is %.3g s %s the one of %s. Set both by NTP.", abs(ahead), where, self.address)
        return welcome

    def _introduce(self, path: str = PATH) -> tuple[int, bytes]:
        said_of_itself = introduce(load_private(self.private), self._name, self._wires, self._process)
        status, said = self._link.post(path, said_of_itself.encode(), MOST_BYTES)
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            raise BrokenLinkError(f"it is busy ({status})")
        return status, said

    def last_word(self, before: Welcome) -> Welcome | None:
        """What the server says last, once the federation is complete; a server that cannot be reached is waited for.

        Args:
            before: What it said first.

        Returns:
            Nothing while the federation goes on. Else a welcome whose `result` names what is to be had; "" for nothing.

        Raises:
            FederationError: it refuses this client now, ended without success, offers something else, or was away for
                longer than the client's patience.
        """
        try:
            status, said = self._introduce()
        except BrokenLinkError as error:
            now = time.monotonic()
            if self._away is None:
                log.warning("%s is away. It is waited for, up to %.0f s.", self.address, self._patience)
                self._away = now
            if now - self._away > self._patience:
                raise FederationError(
                    f"{self.address} has been away for {self._patience:.0f} s ({error}). Join again when it is back."
                ) from error
            return None
        if self._away is not None:
            log.info("%s is back.", self.address)
            self._away = None
        if status == HTTPStatus.GONE:
            self._hear(_verdict(said))
            if _reason(said) == "complete":
                return before
            raise FederationError("The federation ended without success: its owner can say why.")
        if status != HTTPStatus.OK:
            raise FederationError(f"{self.address} refuses this client: {_reason(said)}")
        welcome = Welcome.decode(said)
        self._hear(welcome.verdict)
        if welcome.offer != before.offer:
            raise FederationError(f"{self.address} offers another federation now. Join again.")
        return welcome if welcome.result else None

    def _hear(self, verdict: Verdict | None) -> None:
        if verdict is not None and verdict != self._verdict:
            self._on_verdict(verdict)
        self._verdict = verdict


def _verdict(said: bytes) -> Verdict | None:
    try:
        return Verdict.read(json.loads(said).get("verdict"))
    except (ValueError, AttributeError, RecursionError):
        return None


def _reason(said: bytes) -> str:
    try:
        return str(json.loads(said)["reason"])[:500]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "it is no fedproxy server"
