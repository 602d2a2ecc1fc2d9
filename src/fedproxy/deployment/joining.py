"""A data owner's side of the engine `deployment`: a warm session that answers the tasks of a SuperNode."""

import contextlib
import hashlib
import json
import logging
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fedproxy.config import Client, Evaluate
from fedproxy.deployment.address import Address
from fedproxy.deployment.certificates import check_certificate, load_private, make_key, private_openssh, read_small
from fedproxy.deployment.flower import CLIENT_SETTINGS, prepare, spare_loopback
from fedproxy.deployment.flower.runtime import AGENT_APP, CLIENT_APP, Task
from fedproxy.deployment.flower.supernode import OtherSuperNode, SuperNode
from fedproxy.deployment.handout.fetch import default_cache, fetch_proxy
from fedproxy.deployment.handout.link import BrokenLinkError, Link
from fedproxy.deployment.keys import read_client_key
from fedproxy.deployment.welcome import MOST_BYTES, PATH, Welcome, introduce
from fedproxy.errors import ArtifactError, FederationError, FedproxyError, ResourceError, UsageError, told
from fedproxy.federation.client_rows import parted_rows, rows_of
from fedproxy.federation.offer import Limits, Offer, check_offer
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
        validation: File of rows to score on, in place of a part of its data; "" for such a part.
        scores: Whether it scores adapters at all.
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
    validation: str = ""
    scores: bool = True


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
    on_ready: Callable[[int, int], None],
    on_step: Callable[[int, int, int, float], None],
    on_answer: Callable[[int], None],
    on_refusal: Callable[[str], None],
) -> None:
    """Take part in a federation until the server ends it.

    Args:
        joining: What the data owner brings.
        on_welcome: Told the server's welcome.
        on_bytes: Told bytes of the proxy that are there, and in all.
        on_ready: Told rows and steps a round, once the client waits for orders.
        on_step: Told round, step, steps and loss.
        on_answer: Told the bytes of an update or a score that went out.
        on_refusal: Told why an order was refused, where the next one may go better.

    Raises:
        FederationError: the server cannot be reached, refuses this client, has another offer than the one that it
            takes, or asks for more or less than it allows.
        ArtifactError: key, data, proxy or what this client remembers cannot be used.
        UsageError: plaintext beyond loopback, or the cache cannot be written.
        ResourceError: the disk is full, or memory does not suffice.
    """
    prepare(CLIENT_SETTINGS)
    owner, cache, limits = Owner(joining), joining.cache or default_cache(), joining.limits
    welcome = owner.ask()
    on_welcome(welcome)
    offer, name = welcome.offer, welcome.name
    if joining.offer not in ("", offer.sha256):
        raise FederationError(f"{joining.address} offers {offer.sha256}, not {joining.offer}, which this client takes.")
    data = Client(name, joining.client.data, joining.client.task, offer.max_rows)
    rows, held = parted_rows(
        rows_of(data, joining.evaluate, offer.seed),
        offer.federate.validation,
        offer.seed,
        name,
        file=joining.validation,
        scores=joining.scores,
    )
    check_offer(offer, limits, rows=len(rows), steps=optimizer_steps(len(rows), offer.train))
    proxy = fetch_proxy(owner.url, welcome.token, offer.proxy, cache, owner.ca, on_bytes, most=limits.max_download)
    state = cache / "clients" / owner.authority / offer.id
    session = Session.open(proxy, offer, limits, state=state, trust_remote_code=joining.trust_remote_code)
    steps = session.take_rows(name, rows, held)
    with tempfile.TemporaryDirectory(prefix="fedproxy-") as folder:
        node, answered = _node(Path(folder), owner, welcome, joining.supernode), -ANSWER_SECONDS
        asked = heard = time.monotonic()
        try:
            on_ready(len(rows), steps)
            while True:
                if time.monotonic() - asked > STATUS_SECONDS:
                    if not owner.still_offers(offer):
                        break
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
                        fault, answered = _work(task, name, session, on_step, on_answer, on_refusal), time.monotonic()
                        if fault is not None:
                            raise fault
                        continue
                time.sleep(POLL_SECONDS)
        except FedproxyError:
            time.sleep(max(0.0, answered + ANSWER_SECONDS - time.monotonic()))
            raise
        finally:
            node.close()


def _node(folder: Path, owner: "Owner", welcome: Welcome, elsewhere: Elsewhere | None) -> SuperNode | OtherSuperNode:
    """The SuperNode of this client, started unless it is another's."""
    if elsewhere is not None:
        secret = None if elsewhere.secret is None else read_small(elsewhere.secret)
        ca = None if elsewhere.ca is None else check_certificate(read_small(elsewhere.ca), elsewhere.ca)
        return OtherSuperNode(str(elsewhere.address), secret, ca)
    superlink = str(owner.address)
    if owner.ca is None:  # a SuperNode without TLS has a key of its own, and cannot say whose it is
        superlink = f"{welcome.name}:{welcome.token}@{superlink}"
    node = SuperNode(folder, superlink, owner.ca, owner.private)
    node.start()
    return node


def _work(
    task: Task,
    name: str,
    session: Session,
    on_step: Callable[[int, int, int, float], None],
    on_answer: Callable[[int], None],
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
            answer, fault = session.answer(name, order, on_step)
        task.answer(pack(ANSWER, answer))
    except (FederationError, ValueError) as error:
        with contextlib.suppress(FederationError):
            task.refuse(plain(told(FederationError(str(error))), 500))
        on_refusal(str(error))
        return None
    if isinstance(fault, UsageError | ArtifactError | ResourceError):
        return fault
    if fault is None:
        on_answer(len(answer))
    else:
        on_refusal(str(fault))
    return None


class Owner:
    """The server as a client sees it.

    Args:
        joining: What the data owner brings.

    Attributes:
        authority: What tells owners apart that give their runs the same identity: the hash of the CA's certificate.

    Raises:
        ArtifactError: the key cannot be used.
        UsageError: plaintext beyond loopback, or no CA.
    """

    def __init__(self, joining: Joining, *, looks: bool = False) -> None:
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
        self._link = Link(self.url, None, self.ca)
        self._away: float | None = None

    def close(self) -> None:
        """Close the connection."""
        self._link.close()

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
        ahead = welcome.ahead(asked, time.time())
        if abs(ahead) > CLOCK_SECONDS:
            where = "ahead of" if ahead > 0 else "behind"
            log.warning("This clock is %.3g s %s the one of %s. Set both by NTP.", abs(ahead), where, self.address)
        return welcome

    def _introduce(self) -> tuple[int, bytes]:
        key: Any = load_private(self.private)
        status, said = self._link.post(
            PATH, introduce(key, self._name, self._wires, self._process).encode(), MOST_BYTES
        )
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            raise BrokenLinkError(f"it is busy ({status})")
        return status, said

    def still_offers(self, offer: Offer) -> bool:
        """Whether the federation goes on; a server that cannot be reached is waited for.

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
            return True
        if self._away is not None:
            log.info("%s is back.", self.address)
            self._away = None
        if status == HTTPStatus.GONE:
            if _reason(said) == "complete":
                return False
            raise FederationError("The federation ended without success: its owner can say why.")
        if status != HTTPStatus.OK:
            raise FederationError(f"{self.address} refuses this client: {_reason(said)}")
        if Welcome.decode(said).offer != offer:
            raise FederationError(f"{self.address} offers another federation now. Join again.")
        return True


def _reason(said: bytes) -> str:
    try:
        return str(json.loads(said)["reason"])[:500]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "it is no fedproxy server"
