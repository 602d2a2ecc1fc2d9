"""Who may take part: the owner's folder of keys, and the register of clients in it.

DIR/ca.crt, ca.key          the owner's certificate authority; clients trust what it signed. ca.key may lie elsewhere
DIR/server.crt, server.key  what the server shows to clients
DIR/clients.json            the register: every client's name and public key
DIR/clients/NAME.key        to be handed over to a client: its private key, and behind it the CA's certificate
"""

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedproxy.artifacts import locked, new_directory, new_file, read_json, write_json, write_secret
from fedproxy.config import CLIENT_NAME, did_you_mean
from fedproxy.deployment.certificates import (
    certificate_pem,
    check_certificate,
    check_private_key,
    check_public_key,
    fingerprint,
    hosts_of,
    load_ca_key,
    load_certificate,
    make_ca,
    make_key,
    make_server_certificate,
    private_openssh,
    private_pem,
    public_openssh,
    read_small,
)
from fedproxy.errors import ArtifactError, UsageError

FORMAT = 1
CA, CA_KEY, SERVER, SERVER_KEY, CLIENTS = "ca.crt", "ca.key", "server.crt", "server.key", "clients.json"
LOCAL_HOSTS = ("localhost", "127.0.0.1")
WARNING_DAYS = 30
"""The owner is warned so many days before a certificate ends."""
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_STATES = ("active", "revoked")


@dataclass(frozen=True)
class Client:
    """A registered client.

    Attributes:
        name: Its name.
        public_key: Its public key in OpenSSH's format, without a comment.
        fingerprint: The key's SHA-256, as `ssh-keygen -l` writes it.
        added: When it was registered, ISO 8601.
        state: "active" or "revoked".
    """

    name: str
    public_key: str
    fingerprint: str
    added: str
    state: str = "active"


@dataclass(frozen=True)
class Registry:
    """clients.json.

    Attributes:
        clients: Clients by name, in the order of their names.
        revoked_keys: Fingerprints of all keys that were ever revoked; none of them is taken again.
    """

    clients: dict[str, Client]
    revoked_keys: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ClientKey:
    """What a client proves itself with.

    Attributes:
        private_openssh: Its private key in OpenSSH's format.
        ca: The certificate of the owner's CA in PEM; none if the file holds only a key.
    """

    private_openssh: bytes
    ca: bytes | None


def init_keys(folder: Path, hosts: Sequence[str] = (), ca_key_file: Path | None = None) -> list[str]:
    """Make a folder of keys: a certificate authority and a server certificate, on P-384.

    Args:
        folder: The folder to make.
        hosts: Names and IP addresses that clients reach the server by; `LOCAL_HOSTS` are added.
        ca_key_file: Where the authority's private key goes, outside the folder; into it if not given.

    Returns:
        The hosts that the server certificate is for.

    Raises:
        UsageError: the folder or the file exists, or a host is neither a name nor an address.
    """
    if ca_key_file is not None:
        _check_new_key(Path(ca_key_file))
        if Path(ca_key_file).resolve().is_relative_to(Path(folder).resolve()):
            raise UsageError(f"{ca_key_file} lies in {folder}. Give a place outside it, or none.")
    names = list(dict.fromkeys([*hosts, *LOCAL_HOSTS]))
    ca_key, server_key = make_key(), make_key()
    ca = make_ca(ca_key)
    server = make_server_certificate(server_key, ca, ca_key, names)
    with new_directory(Path(folder)) as made:
        made.chmod(0o700)
        _write(made / CA, certificate_pem(ca))
        write_secret(ca_key_file or made / CA_KEY, private_pem(ca_key))
        _write(made / SERVER, certificate_pem(server))
        write_secret(made / SERVER_KEY, private_pem(server_key))
        _write_registry(made, Registry({}))
    return names


def renew_server(folder: Path, ca_key_file: Path | None = None) -> list[str]:
    """Make the server a new key and certificate, for the same hosts and by the same authority: clients need nothing.

    A kill in between leaves a key without its certificate; to renew once more mends that.

    Args:
        folder: The owner's folder of keys.
        ca_key_file: The authority's private key, if it lies elsewhere.

    Returns:
        The hosts that the certificate is for.

    Raises:
        UsageError: the folder or the authority's private key is missing.
        ArtifactError: a file cannot be used, the authority's certificate has expired, or the key is another's.
    """
    folder = Path(folder)
    source = Path(ca_key_file or folder / CA_KEY)
    with _changing(folder):
        if not source.exists():
            raise UsageError(f"{source}, the CA's private key, is missing. Give the file with --ca-key FILE.")
        ca = load_certificate(check_certificate(read_small(folder / CA), folder / CA), folder / CA)
        hosts = hosts_of(load_certificate(read_small(folder / SERVER), folder / SERVER))
        key = make_key()
        certificate = make_server_certificate(key, ca, load_ca_key(read_small(source), ca, source), hosts)
        write_secret(folder / SERVER_KEY, private_pem(key))
        _write(folder / SERVER, certificate_pem(certificate))
    return hosts


def ending_certificates(folder: Path) -> dict[str, datetime.datetime]:
    """The files of certificates that end within `WARNING_DAYS`, and when.

    Raises:
        ArtifactError: one of them cannot be used.
    """
    files = [Path(folder) / name for name in (CA, SERVER)]
    ends = {file.name: load_certificate(read_small(file), file).not_valid_after_utc for file in files}
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=WARNING_DAYS)
    return {name: end for name, end in ends.items() if end < soon}


def add_client(folder: Path, name: str, public_key: Path | None = None) -> Client:
    """Register a client under a name that is free or revoked.

    Args:
        folder: The owner's folder of keys.
        name: The client's name: 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit.
        public_key: File with the public key that the client made itself. Without it a key is made, and
            `client_key_file` is what to hand over.

    Returns:
        The client as registered.

    Raises:
        UsageError: the folder is missing, the name is impossible or taken, or the key is another client's or revoked.
        ArtifactError: the public key or a file of the folder cannot be used.
    """
    if not CLIENT_NAME.fullmatch(name):
        raise UsageError(
            f"client name {name!r}: must be 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit."
        )
    with _changing(Path(folder)) as registry:
        if name in registry.clients and registry.clients[name].state == "active":
            raise UsageError(f'"{name}" is registered already. Rotate its key, or choose another name.')
        return _enter(Path(folder), registry, name, public_key)


def rotate_client(folder: Path, name: str, public_key: Path | None = None) -> Client:
    """Give a client another key, and revoke its old one in the same moment.

    Args:
        folder: The owner's folder of keys.
        name: The client's name.
        public_key: As of `add_client`.

    Returns:
        The client with its new key.

    Raises:
        UsageError: the folder is missing, there is no such client or it is revoked, or the key is taken or revoked.
        ArtifactError: the public key or a file of the folder cannot be used.
    """
    with _changing(Path(folder)) as registry:
        return _enter(Path(folder), _without(registry, name, folder), name, public_key)


def _enter(folder: Path, registry: Registry, name: str, public_key: Path | None) -> Client:
    """Write `registry` with a client of this name, whose key is made if it is not given."""
    ca = check_certificate(read_small(folder / CA), folder / CA)
    if public_key is None:
        private = make_key()
        text = public_openssh(private.public_key())
        write_secret(client_key_file(folder, name), private_openssh(private) + ca)
    else:
        text = check_public_key(read_small(public_key), public_key)
    client = Client(name, text, fingerprint(text), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    if client.fingerprint in registry.revoked_keys:
        raise UsageError(f"{public_key}: this key was revoked. Register another one.")
    for other in registry.clients.values():
        if other.fingerprint == client.fingerprint:
            raise UsageError(f'{public_key}: this key is registered as "{other.name}". Every client needs its own.')
    _write_registry(folder, replace(registry, clients={**registry.clients, name: client}))
    return client


def client_key_file(folder: Path, name: str) -> Path:
    """The file to hand over to a client whose key the owner made."""
    return Path(folder) / "clients" / f"{name}.key"


def new_key(path: Path) -> Path:
    """Make a client's pair of keys: `path` stays with the client, `path`.pub goes to the owner.

    Returns:
        The file with the public key.

    Raises:
        UsageError: one of the files exists, or cannot be written.
    """
    public = Path(f"{path}.pub")
    for file in (Path(path), public):
        _check_new_key(file)
    key = make_key()
    write_secret(Path(path), private_openssh(key))
    _write(public, f"{public_openssh(key.public_key())}\n".encode())
    return public


def revoke_client(folder: Path, name: str) -> Client:
    """Revoke a client's key for good; the name may be given to another key later.

    Returns:
        The client, revoked.

    Raises:
        UsageError: the folder is missing, there is no such client, or it is revoked already.
        ArtifactError: clients.json is damaged.
    """
    with _changing(Path(folder)) as registry:
        left = _without(registry, name, folder)
        _write_registry(Path(folder), left)
    return left.clients[name]


def _without(registry: Registry, name: str, folder: Path) -> Registry:
    """The register in which this client's key is revoked."""
    client = registry.clients.get(name)
    if client is None:
        raise UsageError(f'There is no client "{name}" in {folder}.{did_you_mean(name, registry.clients)}')
    if client.state == "revoked":
        raise UsageError(f'"{name}" is revoked already.')
    clients = {**registry.clients, name: replace(client, state="revoked")}
    return Registry(clients, registry.revoked_keys | {client.fingerprint})


def read_registry(folder: Path) -> Registry:
    """Read and check clients.json.

    Raises:
        UsageError: the folder is missing.
        ArtifactError: the file is missing or damaged.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{folder} is no folder of keys. Make one with: fedproxy keys init {folder}")
    path = Path(folder) / CLIENTS
    record = read_json(path)
    try:
        if not isinstance(record, dict) or set(record) != {"format", "clients", "revoked_keys"}:
            raise ValueError("it must hold format, clients and revoked_keys")
        if record["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        revoked = frozenset(_text(value) for value in record["revoked_keys"])
        clients = [_client(entry, revoked) for entry in record["clients"]]
        for attribute in ("name", "fingerprint"):
            if len({getattr(client, attribute) for client in clients}) < len(clients):
                raise ValueError(f"two clients have the same {attribute}")
    except (TypeError, ValueError, ArtifactError) as error:
        raise ArtifactError(f"{path} is damaged: {str(error).rstrip('.')}. Restore it from a copy.") from error
    return Registry({client.name: client for client in sorted(clients, key=lambda client: client.name)}, revoked)


def read_client_key(path: Path) -> ClientKey:
    """Read a client's key file: a private key, and behind it the CA's certificate if the owner made the file.

    Raises:
        ArtifactError: the file is missing, or what it holds cannot be used.
    """
    private, marker, rest = read_small(path).partition(_CERTIFICATE)
    check_private_key(private, path)
    return ClientKey(private, check_certificate(marker + rest, path) if marker else None)


def _client(entry: object, revoked: frozenset[str]) -> Client:
    if not isinstance(entry, dict):
        raise TypeError(f"{entry!r} is no client")
    client = Client(**{key: _text(value) for key, value in entry.items()})
    if not CLIENT_NAME.fullmatch(client.name):
        raise ValueError(f"{client.name!r} is no name")
    if client.state not in _STATES or (client.state == "revoked") != (client.fingerprint in revoked):
        raise ValueError(f"the state of {client.name} is {client.state!r}, which revoked_keys contradicts")
    public_key = check_public_key(client.public_key.encode(), f"the public key of {client.name}")
    if (public_key, fingerprint(public_key)) != (client.public_key, client.fingerprint):
        raise ValueError(f"the fingerprint of {client.name} is not that of its key")
    return client


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[Registry]:
    """The register, for one process at a time to change."""
    read_registry(folder)
    with locked(folder):
        yield read_registry(folder)


def _write_registry(folder: Path, registry: Registry) -> None:
    clients = [asdict(client) for _, client in sorted(registry.clients.items())]
    write_json(folder / CLIENTS, {"format": FORMAT, "clients": clients, "revoked_keys": sorted(registry.revoked_keys)})


def _check_new_key(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path} exists. Give another path; a key is never overwritten.")


def _write(path: Path, content: bytes) -> None:
    with new_file(path) as file:
        file.write(content)
