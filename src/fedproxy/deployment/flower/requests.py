"""Requests of SuperNodes to Flower's Fleet API, as the gateway sees them: who signed one, and what is said to it."""

import base64
import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

FLEET = "/v1/fleet/"
KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER = "flwr-public-key", "flwr-signature", "flwr-timestamp"
EARLIEST_SECONDS, LATEST_SECONDS = -5.0, 305.0
"""How old a signature may be; Flower's own limits."""


class RefusedError(Exception):
    """A request that is not passed on; the message says why."""


@dataclass(frozen=True)
class Said:
    """An answer of the SuperLink."""

    status: int
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


Ask = Callable[[str, bytes], Said]
"""Sends a request of this name and body to the SuperLink."""


def named(headers: Mapping[str, str]) -> str:
    """The public key (PEM) that a request names; whether it signed it, `signer` tells.

    Raises:
        ValueError: it names none.
    """
    return base64.b64decode(headers.get(KEY_HEADER, ""), validate=True).decode()


def signer(headers: Mapping[str, str]) -> str:
    """The public key (PEM) that signed a request's time.

    Args:
        headers: Of the request, names in lower case.

    Raises:
        ValueError: there is no valid signature of now.
    """
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        pem = named(headers)
        signature, signed = base64.b64decode(headers[SIGNATURE_HEADER], validate=True), headers[TIME_HEADER]
        moment = datetime.datetime.fromisoformat(signed)
        if not EARLIEST_SECONDS < (datetime.datetime.now(datetime.UTC) - moment).total_seconds() < LATEST_SECONDS:
            raise ValueError("the signature is not of now")
        key: Any = load_pem_public_key(pem.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise TypeError("no ECDSA key")
        key.verify(signature, signed.encode("ascii"), ec.ECDSA(hashes.SHA256()))
        return pem
    except (KeyError, TypeError, OverflowError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise ValueError(f"no valid signature: {error}") from error
