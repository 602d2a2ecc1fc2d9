"""Who a member is: its registered key, and those of its peers, by which keys of one round are known to be theirs."""

from collections.abc import Iterable, Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedproxy.errors import SumsError

_SIGNATURE = ec.ECDSA(hashes.SHA384())


class Identity:
    """A member's registered key and those of its peers.

    Args:
        name: Its name.
        private: Its key.
        peers: Public keys by name; its own may be among them.
    """

    def __init__(
        self, name: str, private: ec.EllipticCurvePrivateKey, peers: Mapping[str, ec.EllipticCurvePublicKey]
    ) -> None:
        self.name = name
        self._private = private
        self._peers = {**peers, name: private.public_key()}

    def sign(self, message: bytes) -> bytes:
        """The signature of a message: ECDSA with SHA-384, DER."""
        return self._private.sign(message, _SIGNATURE)

    def verify(self, name: str, message: bytes, signature: bytes) -> None:
        """Check that a peer signed a message.

        Raises:
            SumsError: nobody is registered under the name, or another signed, or signed something else.
        """
        if name not in self._peers:
            raise SumsError(f"{name}: no key is registered under this name.")
        try:
            self._peers[name].verify(signature, message, _SIGNATURE)
        except InvalidSignature as error:
            raise SumsError(f"{name}: its registered key did not sign this for this run, round and attempt.") from error


def drawn(names: Iterable[str]) -> dict[str, Identity]:
    """Identities with fresh keys on P-384, for members that share one process."""
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in names}
    peers = {name: key.public_key() for name, key in keys.items()}
    return {name: Identity(name, key, peers) for name, key in keys.items()}
