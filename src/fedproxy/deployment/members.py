"""Who may take part in a running federation: the register of keys as it is at each moment, or whoever comes.

RUN/members.json tells the members to the process that drives the rounds: name → public key of its SuperNode.
"""

import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fedproxy.artifacts import read_json, write_json
from fedproxy.config import CLIENT_NAME
from fedproxy.deployment.certificates import fingerprint_of_pem
from fedproxy.deployment.keys import CLIENTS, read_registry
from fedproxy.deployment.welcome import StrangerError, public_pem
from fedproxy.errors import ArtifactError, FedproxyError
from fedproxy.run_directory import MEMBERS

log = logging.getLogger(__name__)

TAKEN_SECONDS = 30.0
"""Without a register, how long a name stays taken after its holder was last heard of."""


@dataclass(frozen=True)
class Member:
    """A client that may take part.

    Attributes:
        name: Its name.
        public_key: PEM.
    """

    name: str
    public_key: str

    @property
    def identity(self) -> str:
        """Name and key together: whoever inherits a name does not inherit what was issued to the key before."""
        return f"{self.name} {self.public_key}"

    @property
    def fingerprint(self) -> str:
        """The key's, as the register has it."""
        return fingerprint_of_pem(self.public_key)


class Members:
    """The members of a run.

    While the register is damaged nobody is known: what asks for a member raises.

    Args:
        folder: The owner's folder of keys; none lets anyone in who gives a free name, for runs without keys.
        run: The run directory.
        names: The names that take part; empty for all.

    Raises:
        ArtifactError, UsageError: the register cannot be used.
    """

    def __init__(self, folder: Path | None, run: Path, names: Collection[str] = ()) -> None:
        self._folder, self._file, self._names = folder, run / MEMBERS, frozenset(names)
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._fault = ""
        self._members: dict[str, Member] = {}
        self._others: dict[str, str] = {}
        self._revoked: frozenset[str] = frozenset()
        self._heard: dict[str, float] = {}
        self._seats: dict[str, str] = {}
        self._read()
        self._tell()

    @property
    def registered(self) -> bool:
        """Whether keys are registered."""
        return self._folder is not None

    @property
    def all(self) -> dict[str, Member]:
        """The members by name.

        Raises:
            ArtifactError, UsageError: the register cannot be used.
        """
        with self._lock:
            self._read()
            return dict(self._members)

    def find(self, public_key: str) -> Member | None:
        """The member with this public key, if there is one; raises as `all` does."""
        found = next((member for member in self.all.values() if member.public_key == public_key), None)
        if found is not None:
            self._heard[found.name] = time.monotonic()
        return found

    def seat(self, name: str, key: str) -> str | None:
        """Take note that a member's SuperNode has a key of its own, as it has without a register.

        Returns:
            The key of the one before, if there was one.
        """
        with self._lock:
            before, self._seats[name] = self._seats.get(name), key
            self._tell()
            return before

    def holds(self, identity: str) -> bool:
        """Whether a member has this identity; raises as `all` does."""
        return any(member.identity == identity for member in self.all.values())

    def refresh(self) -> dict[str, Member]:
        """The members by name as the register said when it could be used last; a damage is logged once."""
        try:
            found, self._fault = self.all, ""
        except FedproxyError as error:
            if str(error) != self._fault:
                log.warning("Nobody is let in until this is mended: %s", error)
            self._fault = str(error)
            found = dict(self._members)
        return found

    def enter(self, public_key: str, name: str, *, stay: bool = True) -> Member:
        """The member with this key; without a register, `name` becomes one unless another has taken it.

        Args:
            public_key: PEM.
            name: What it calls itself.
            stay: Whether it takes part, and is not only looking.

        Raises:
            StrangerError: there is no such member; the message says why.
            ArtifactError, UsageError: the register cannot be used.
        """
        with self._lock:
            self._read()
            found = next((member for member in self._members.values() if member.public_key == public_key), None)
            if found is not None:
                self._heard[found.name] = time.monotonic()
                return found
            if self._folder is not None:
                raise StrangerError(self._why_not(public_key))
            if not CLIENT_NAME.fullmatch(name):
                raise StrangerError(f"{name!r:.80} is no name for a client: join with --name NAME.")
            if self._names and name not in self._names:
                raise StrangerError(f"{name} takes no part in this federation: {', '.join(sorted(self._names))}.")
            if time.monotonic() - self._heard.get(name, -TAKEN_SECONDS) < TAKEN_SECONDS:
                raise StrangerError(f"Another client is here as {name}. Choose another name, or end that one first.")
            member = Member(name, public_key)
            if stay:
                self._heard[name] = time.monotonic()
                self._members[name] = member
                self._tell()
            return member

    def _why_not(self, public_key: str) -> str:
        if public_key in self._others:
            return f"{self._others[public_key]} takes no part in this federation."
        if fingerprint_of_pem(public_key) in self._revoked:
            return "This key was revoked. Ask the owner of the model for a new one."
        return "This key is not registered. Send its public key to the owner of the model."

    def _read(self) -> None:
        if self._folder is None:
            return
        state = (self._folder / CLIENTS).stat() if (self._folder / CLIENTS).exists() else None
        stamp = (state.st_mtime_ns, state.st_ino) if state else (0, 0)
        if stamp == self._stamp:
            return
        register = read_registry(self._folder)
        active = {c.name: _pem(c.public_key) for c in register.clients.values() if c.state == "active"}
        taking_part = self._names or active.keys()
        self._members = {name: Member(name, key) for name, key in active.items() if name in taking_part}
        self._others = {key: name for name, key in active.items() if name not in taking_part}
        self._revoked = register.revoked_keys
        if self._stamp is not None:
            self._tell()
        self._stamp = stamp

    def _tell(self) -> None:
        write_json(
            self._file, {name: self._seats.get(name, member.public_key) for name, member in self._members.items()}
        )


def read_members(run: Path) -> dict[str, str]:
    """The members that `Members` told: name → public key, PEM."""
    return {str(name): str(key) for name, key in read_json(run / MEMBERS).items()}


def _pem(openssh: str) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    key = load_ssh_public_key(openssh.encode())
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ArtifactError("a registered key is no ECDSA key")
    return public_pem(key)
