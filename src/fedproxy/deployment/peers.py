"""The other clients' public keys, as a client has them from these clients themselves: without them no secure sum.

A line a client: its name, and its public key in OpenSSH's format, as `fedproxy keys new` writes it. A server that
handed the keys out could hand out its own.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from fedproxy.config import CLIENT_NAME
from fedproxy.deployment.certificates import check_public_key, load_private, load_public, public_openssh, read_small
from fedproxy.errors import ArtifactError, FederationError
from fedproxy.federation.offer import Offer

if TYPE_CHECKING:
    from fedproxy.privacy.sums.identity import Identity


def read_peers(path: Path) -> dict[str, str]:
    """The public keys in a file of peers, by name, in OpenSSH's format without comments.

    Raises:
        ArtifactError: the file is missing, or a line is no name and public key, or of a name or key that another has.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(read_small(path).decode(errors="replace").splitlines(), 1):
        name, _, key = line.strip().partition(" ")
        if not name or name.startswith("#"):
            continue
        where = f"{path}, line {number}"
        if not CLIENT_NAME.fullmatch(name):
            raise ArtifactError(f"{where}: {name[:80]!r} is no client's name. A line is NAME, and its public key.")
        public = check_public_key(key.strip().encode(), where)
        if name in found or public in found.values():
            raise ArtifactError(f"{where}: the name {name}, or its key, stands there twice.")
        found[name] = public
    return found


def identity(name: str, private: bytes, path: Path) -> "Identity":
    """Who a client is in secure sums.

    Args:
        name: Its name.
        private: Its private key, in OpenSSH's format.
        path: The file of peers.

    Raises:
        ArtifactError: as of `read_peers`, or the file has another key for this client.
    """
    from fedproxy.privacy.sums.identity import Identity

    key, peers = load_private(private), read_peers(path)
    own = public_openssh(key.public_key())
    if peers.get(name, own) != own:
        raise ArtifactError(f"{path}: the key of {name} is another than this client's own.")
    return Identity(name, key, {peer: load_public(public) for peer, public in peers.items()})


def check_peers(offer: Offer, address: str, key: Path | None, peers: Path | None) -> None:
    """Check that an offer has secure sums and this client the keys for them, or neither.

    Args:
        offer: What the server offers.
        address: The server's.
        key: The client's key file.
        peers: Its file of peers.

    Raises:
        FederationError: only one of them has.
    """
    if offer.federate.secure and (peers is None or key is None):
        raise FederationError(
            f"{address} offers secure sums, for which this client needs its own key and those of the other clients: "
            "join with --key FILE and --peers FILE."
        )
    if peers is not None and not offer.federate.secure:
        raise FederationError(f"{address} offers no secure sums, and with --peers this client takes nothing else.")
