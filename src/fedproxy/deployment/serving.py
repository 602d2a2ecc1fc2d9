"""The owner's side of the engine `deployment`: SuperLink, gateway and run, held together while the rounds last."""

import contextlib
import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from fedproxy.adapter_files import WEIGHTS_FILE, read_adapter
from fedproxy.artifacts import read_json, write_json
from fedproxy.config import Experiment
from fedproxy.deployment.address import Address
from fedproxy.deployment.audit import AUDIT, Audit
from fedproxy.deployment.flower import ANSWERED_VARIABLE, OUTCOME_VARIABLE, RUN_VARIABLE, require_flower
from fedproxy.deployment.flower.announced import Announced
from fedproxy.deployment.flower.superlink import SuperLink
from fedproxy.deployment.gateway import Gateway, Upstream
from fedproxy.deployment.handout.https import check_tls
from fedproxy.deployment.handout.parts import PART_BYTES, describe
from fedproxy.deployment.keys import CA, SERVER, SERVER_KEY, ending_certificates, read_registry
from fedproxy.deployment.members import Member, Members
from fedproxy.deployment.verdicts import Verdicts
from fedproxy.errors import ArtifactError, FedproxyError, UsageError
from fedproxy.federation.offer import make_offer
from fedproxy.federation.protocol import answer_limit
from fedproxy.federation.settings import check_roster
from fedproxy.federation.tuning import START
from fedproxy.run_directory import RunDirectory, raise_outcome
from fedproxy.tensors import digest

log = logging.getLogger(__name__)

IDENTITY = "identity.json"
"""RUN/identity.json: the number by which clients know the run, drawn once."""
POLL_SECONDS = 0.1
FASTEST_PAUSE, PAUSE_A_CLIENT = 1.0, 0.02
"""The SuperLink is asked for each client's messages every so many seconds; with many of them, less often."""
FAREWELL_SECONDS = 15.0
"""How long the clients that were there in as many seconds before may take to ask how it ended."""
RESULT_SECONDS, RESULT_QUIET_SECONDS, SLOWEST = 60.0, 300.0, 12_000.0
"""How long clients may take to begin with the result, how long be silent before they count as gone, and the bytes a
second at which they may fetch it."""


@dataclass(frozen=True)
class Listen:
    """Where and how the server listens.

    Attributes:
        address: Where.
        keys: The owner's folder of keys; none for plaintext.
        force: Plaintext beyond loopback is meant.
        part_bytes: Size of the parts that the proxy is handed out in.
    """

    address: Address
    keys: Path | None
    force: bool = False
    part_bytes: int = PART_BYTES

    def check(self, experiment: Experiment) -> None:
        """Check that clients could be served, before anything is done for them; warn of certificates that end soon.

        Raises:
            UsageError: plaintext beyond loopback, a partition, clients without names or keys, or as of `check_roster`;
                or the address is taken.
            MissingExtraError: Flower is not installed.
            ArtifactError: the keys cannot be used.
        """
        require_flower()
        if experiment.partition is not None:
            raise UsageError(
                "[partition] cuts one file or task into clients, which is for the engines inline and simulation. Name "
                "the clients in [[client]] tables, or leave them out to let in every registered key."
            )
        if self.keys is None and not (self.address.is_loopback or self.force):
            raise UsageError(
                f"{self.address}: without keys nothing is encrypted and anyone may take part. Give --keys DIR, or add "
                "--force if the network is your own."
            )
        if self.keys is None and not experiment.client:
            raise UsageError("Without keys the experiment must name its clients in [[client]] tables.")
        if self.keys is not None:
            check_roster(experiment.federate, _members(self.keys, experiment.client_names))
            check_tls(*_certificates(self.keys))
            _warn_of_ends(self.keys)
        self.address.check_free()


def serve(
    experiment: Experiment,
    directory: RunDirectory,
    listen: Listen,
    on_ready: Callable[[str], None],
    on_poll: Callable[[], None],
) -> None:
    """Serve the rounds that are left to clients elsewhere, and keep RUN/audit.jsonl.

    Args:
        experiment: The experiment.
        directory: The run, prepared.
        listen: Where clients reach it, checked.
        on_ready: Told the address once clients can join.
        on_poll: Called several times a second while it runs.

    Raises:
        FederationError: too few clients, or a round without a quorum; or Flower ended.
        UsageError: the address or the keys cannot be used.
        ArtifactError: keys or proxy cannot be used.
    """
    from fedproxy.deployment.flower.fleet import Fleet

    run, keys = directory.path.resolve(), listen.keys and listen.keys.resolve()
    names = experiment.client_names
    members = Members(keys, run, names)
    certificates = None if keys is None else _certificates(keys)
    listing = describe(run / "proxy", listen.part_bytes)
    adapter, federate = read_adapter(run / START)[1], experiment.federate
    start, most = digest(adapter), answer_limit(adapter, federate)
    identity = run_identity(run)
    with Audit(run / AUDIT) as audit, tempfile.TemporaryDirectory(prefix="fedproxy-") as folder:
        outcome, answered = Path(folder) / "outcome.json", Path(folder) / "answered"
        answered.mkdir()
        environment = {RUN_VARIABLE: str(run), OUTCOME_VARIABLE: str(outcome), ANSWERED_VARIABLE: str(answered)}
        link = SuperLink(Path(folder), certificates=certificates, environment=environment)
        fleet = Fleet(Announced(answered), most, max(FASTEST_PAUSE, PAUSE_A_CLIENT * len(names or members.all)))
        verdicts = Verdicts(run, audit)
        gateway = Gateway(
            run / "proxy",
            listing,
            listen.address.host,
            listen.address.port,
            certificates and certificates[0],
            certificates and certificates[1],
            members=members,
            offer=lambda name, spoken: make_offer(
                experiment, name, run_id=identity, proxy=listing.sha256, start=start, spoken=spoken
            ),
            upstream=Upstream(link.port, link.ca),
            fleet=fleet,
            audit=audit,
            verdict=verdicts.of,
        )
        ended: str | None = None
        try:
            link.start()
            known: set[str] = set()
            there: frozenset[Member] = frozenset()
            if keys is not None:
                there = _register(link, members, known, there, audit)
            gateway.start()
            link.run()
            address = str(Address(listen.address.host, gateway.port))
            audit.note("started", address=address)
            on_ready(address)
            while not raise_outcome(outcome):
                link.check()
                if keys is not None:
                    before, there = there, _register(link, members, known, there, audit)
                    for member in before - there:
                        fleet.leave(member.public_key)
                verdicts.follow()
                audit.flush()
                on_poll()
                time.sleep(POLL_SECONDS)
            ended = "complete"
        except FedproxyError:
            ended = "failed" if outcome.is_file() else None
            raise
        finally:
            link.close()
            with contextlib.suppress(FedproxyError):  # what ended the run is what is told
                verdicts.follow()
            if ended is not None:  # else the clients wait for the run to be resumed
                shared = ended == "complete" and experiment.federate.share_result
                _say_farewell(gateway, ended, run / "adapter" / WEIGHTS_FILE if shared else None)
            gateway.close()
            with contextlib.suppress(FedproxyError):
                audit.note("ended", how=ended or "interrupted")


def run_identity(run: Path) -> str:
    """The random number of a run, which stays with its directory and is another one after `--overwrite`.

    Raises:
        ArtifactError: RUN/identity.json is damaged.
    """
    path = run / IDENTITY
    if not path.exists():
        write_json(path, {"id": secrets.token_hex(8)})
    record = read_json(path)
    identity = record.get("id") if isinstance(record, dict) else None
    if not isinstance(identity, str):
        raise ArtifactError(f"{path} is damaged. Restore it from a copy, or remove it: clients then begin anew.")
    return identity


def _say_farewell(gateway: Gateway, how: str, result: Path | None) -> None:
    """Give the clients that were there the time to ask how it ended, and to fetch what they get of it."""
    if how == "failed":
        log.warning("The clients are told and end as well: after `fedproxy serve --resume`, each has to join again.")
    size = gateway.end(how, result)
    patience, quiet = FAREWELL_SECONDS, 2 * FAREWELL_SECONDS
    if result is not None:
        patience, quiet = RESULT_SECONDS + size / SLOWEST, RESULT_QUIET_SECONDS
    until = time.monotonic() + patience
    while gateway.untold(quiet) and time.monotonic() < until:
        time.sleep(POLL_SECONDS)


def _certificates(keys: Path) -> tuple[Path, Path, Path]:
    """The server's certificate, its key and the CA's certificate."""
    return keys / SERVER, keys / SERVER_KEY, keys / CA


def _members(keys: Path, names: list[str]) -> Collection[str]:
    """The clients that a run begins with: those named, which must have keys, or all that have."""
    there = {name for name, client in read_registry(keys).clients.items() if client.state == "active"}
    if missing := [name for name in names if name not in there]:
        raise UsageError(
            f"{keys} holds no valid key of {', '.join(missing)}. Add it with: fedproxy keys add {keys} {missing[0]}"
        )
    if not there:
        raise UsageError(f"{keys} holds no client's key. Add one with: fedproxy keys add {keys} NAME")
    return names or there


def _register(
    link: SuperLink, members: Members, known: set[str], there: frozenset[Member], audit: Audit
) -> frozenset[Member]:
    """Tell the SuperLink the keys of members it does not know yet, and note who came and went since `there`."""
    now = frozenset(members.refresh().values())
    fresh = {member.public_key for member in now} - known
    if fresh:
        link.register([key.encode() for key in sorted(fresh)])
        known |= fresh
    for event, changed in (("revoked", there - now), ("registered", now - there)):
        for member in sorted(changed, key=lambda member: member.name):
            audit.note(event, member.name, key=member.fingerprint)
    return now


def _warn_of_ends(keys: Path) -> None:
    """Warn of certificates that end soon."""
    for name, end in ending_certificates(keys).items():
        remedy = f"Renew it with: fedproxy keys renew {keys}" if name == SERVER else "Then all clients need new files"
        log.warning("%s ends on %s. %s.", keys / name, f"{end:%Y-%m-%d}", remedy)
