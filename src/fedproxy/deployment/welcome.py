"""How a client introduces itself, and what the owner answers: who it is to the owner, and what is asked of it."""

import base64
import json
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fedproxy.errors import ArtifactError
from fedproxy.federation.offer import Offer
from fedproxy.federation.protocol import is_name, is_sha256, strict_json
from fedproxy.federation.wire import ENCODINGS
from fedproxy.foreign import plain

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

PATH, FAREWELL = "/fedproxy/welcome", "/fedproxy/farewell"
"""Where a client introduces itself, and where it says by the same words that it has all that it wants."""
MOST_BYTES = 64 << 10
AHEAD_SECONDS, BEHIND_SECONDS = 4.0, 300.0
"""How far the client's clock may be ahead of the owner's and behind it: a little less than Flower takes (5 and 305)."""
_LAST_SECOND, _LAST_ROUND = 1 << 35, 1 << 53
_REASON_CHARACTERS = 500
_PURPOSE = "fedproxy welcome"
_PROCESS = re.compile("([0-9a-f]{16})?")


class StrangerError(ArtifactError):
    """Who introduced itself takes no part; the message says why, and nothing else of the owner."""


@dataclass(frozen=True)
class Introduction:
    """What a client says of itself, signed with its key.

    Attributes:
        public_key: Its public key, PEM (SubjectPublicKeyInfo).
        time: Seconds since 1970 on its clock.
        name: Its name, where no register tells it: in a run without keys.
        wires: The encodings of updates that it agrees to, separated by commas.
        process: A random number of the process, by which two of one client are told apart; "" of one that only looks.
        signature: ECDSA with SHA-256 over purpose, time, name, encodings and process, base64.
    """

    public_key: str
    time: float
    name: str
    wires: str
    process: str
    signature: str

    @property
    def spoken(self) -> frozenset[str]:
        """The encodings as a set."""
        return frozenset(self.wires.split(","))

    def encode(self) -> bytes:
        """The introduction as JSON."""
        return json.dumps(asdict(self)).encode()


def introduce(
    key: "ec.EllipticCurvePrivateKey", name: str = "", wires: Collection[str] = ENCODINGS, process: str = "0" * 16
) -> Introduction:
    """Introduce the holder of `key`, which agrees to updates in these encodings."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    now, spoken = time.time(), ",".join(wires)
    signature = key.sign(_signed(now, name, spoken, process), ec.ECDSA(hashes.SHA256()))
    return Introduction(public_pem(key.public_key()), now, name, spoken, process, base64.b64encode(signature).decode())


def check_introduction(data: bytes) -> Introduction:
    """Read an introduction and check its signature and clock.

    Raises:
        StrangerError: it cannot be read, another key signed it, or the clocks differ by too much.
    """
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        values = strict_json(data.decode())
        said = Introduction(**values)
        texts = (said.public_key, said.name, said.wires, said.process, said.signature)
        if not all(isinstance(value, str) for value in texts) or type(said.time) not in (int, float):
            raise TypeError("wrong types")
        if not 0 <= said.time < _LAST_SECOND:
            raise ValueError("no time")
        if not _PROCESS.fullmatch(said.process):
            raise ValueError("no process")
        key = serialization.load_pem_public_key(said.public_key.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey) or public_pem(key) != said.public_key:
            raise TypeError("no ECDSA key")
        signed = _signed(said.time, said.name, said.wires, said.process)
        key.verify(base64.b64decode(said.signature), signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise StrangerError("The introduction was signed with another key.") from error
    except (ValueError, TypeError, RecursionError, UnsupportedAlgorithm) as error:
        raise StrangerError(
            f"The introduction cannot be read: {error!s:.100}. Install the same version of fedproxy on both sides."
        ) from error
    now = time.time()
    if not -AHEAD_SECONDS <= now - said.time <= BEHIND_SECONDS:
        raise StrangerError(
            f"The clocks differ: the server's says {_clock(now)}, the client's {_clock(said.time)}. "
            f"It may be {AHEAD_SECONDS:g} s ahead and {BEHIND_SECONDS:g} s behind. Set both by NTP."
        )
    return said


def public_pem(key: "ec.EllipticCurvePublicKey") -> str:
    """A public key as Flower sends and lists it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")


def _signed(now: float, name: str, wires: str, process: str) -> bytes:
    return f"{_PURPOSE} {now!r} {name} {wires} {process}".encode()


@dataclass(frozen=True)
class Verdict:
    """What became of a client's answer to an order.

    Attributes:
        round: The round.
        reason: Why it did not count; "" if it did.
    """

    round: int
    reason: str = ""

    @staticmethod
    def read(values: object) -> "Verdict | None":
        """The verdict in JSON that a server sent; none if there is none.

        Raises:
            ArtifactError: it is something else.
        """
        if values is None:
            return None
        match values:
            case {"round": int(number), "reason": str(reason)} if 0 < number < _LAST_ROUND:
                return Verdict(number, plain(reason, _REASON_CHARACTERS))
        raise ArtifactError("The server's word on the last round cannot be read: is it of this version of fedproxy?")


@dataclass(frozen=True)
class Welcome:
    """What the owner answers.

    Attributes:
        name: The client's name to the owner.
        token: For the hand-out of the proxy.
        offer: What the federation asks of the client.
        verdict: What became of its last answer; none before the first round has ended.
        result: Once the federation is complete, the SHA-256 of the listing of what clients get of it; "" before.
        time: Seconds since 1970 on the owner's clock.
    """

    name: str
    token: str
    offer: Offer
    verdict: Verdict | None = None
    result: str = ""
    time: float = field(default_factory=time.time, compare=False)

    def encode(self) -> bytes:
        """The welcome as JSON."""
        return json.dumps(
            {**vars(self), "offer": self.offer.encode(), "verdict": self.verdict and vars(self.verdict)}
        ).encode()

    def ahead(self, asked: float, answered: float) -> float:
        """Seconds by which the client's clock is ahead of the owner's, at least; less than 0 where it is behind.

        Args:
            asked: When the client asked, on its clock.
            answered: When it had the answer.
        """
        return asked - self.time if asked > self.time else min(0.0, answered - self.time)

    @staticmethod
    def decode(data: bytes) -> "Welcome":
        """Read a welcome.

        Raises:
            ArtifactError: it is none, or its offer cannot be used.
        """
        try:
            values: Any = strict_json(data.decode())
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"The server's welcome is no JSON: {error!s:.100}.") from error
        verdict = Verdict.read(values.pop("verdict", None)) if isinstance(values, dict) else None
        kinds: Mapping[str, type] = {"name": str, "token": str, "offer": str, "result": str, "time": float}
        if not isinstance(values, dict) or {key: type(value) for key, value in values.items()} != kinds:
            raise ArtifactError("The server's welcome cannot be read: is it a fedproxy server of this version?")
        if not is_name(values["name"]):
            raise ArtifactError(f"The server's welcome calls this client {values['name']!r:.80}, which is no name.")
        if values["result"] and not is_sha256(values["result"]):
            raise ArtifactError(f"The server's welcome names a result {values['result']!r:.80}, which is no SHA-256.")
        return Welcome(**{**values, "offer": Offer.decode(values["offer"]), "verdict": verdict})
