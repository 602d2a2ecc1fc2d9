"""How a client introduces itself, and what the owner answers: who it is to the owner, and what is asked of it."""

import base64
import json
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fedproxy.errors import ArtifactError
from fedproxy.federation.offer import Offer
from fedproxy.federation.protocol import is_name, strict_json
from fedproxy.federation.wire import ENCODINGS

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

PATH = "/fedproxy/welcome"
MOST_BYTES = 64 << 10
CLOCK_SECONDS = 300.0
"""How far the clocks of client and owner may differ."""
_PURPOSE = "fedproxy welcome"
_PROCESS = re.compile("[0-9a-f]{16}")


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
        process: A random number of the process, by which two of one client are told apart.
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
        StrangerError: it cannot be read, is too old, or another key signed it.
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
    if not abs(time.time() - said.time) <= CLOCK_SECONDS:
        raise StrangerError("The clocks of client and server differ by more than five minutes. Set them.")
    return said


def public_pem(key: "ec.EllipticCurvePublicKey") -> str:
    """A public key as Flower sends and lists it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _signed(now: float, name: str, wires: str, process: str) -> bytes:
    return f"{_PURPOSE} {now!r} {name} {wires} {process}".encode()


@dataclass(frozen=True)
class Welcome:
    """What the owner answers.

    Attributes:
        name: The client's name to the owner.
        token: For the hand-out of the proxy.
        offer: What the federation asks of the client.
    """

    name: str
    token: str
    offer: Offer

    def encode(self) -> bytes:
        """The welcome as JSON."""
        values = {"name": self.name, "token": self.token, "offer": self.offer.encode()}
        return json.dumps(values).encode()

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
        kinds: Mapping[str, type] = {"name": str, "token": str, "offer": str}
        if not isinstance(values, dict) or {key: type(value) for key, value in values.items()} != kinds:
            raise ArtifactError("The server's welcome cannot be read: is it a fedproxy server of this version?")
        if not is_name(values["name"]):
            raise ArtifactError(f"The server's welcome calls this client {values['name']!r:.80}, which is no name.")
        return Welcome(values["name"], values["token"], Offer.decode(values["offer"]))
