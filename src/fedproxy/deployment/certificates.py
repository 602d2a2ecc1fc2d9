"""Keys and certificates in the formats that Flower reads: PEM for certificates, OpenSSH's for clients' keys."""

import base64
import datetime
import hashlib
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedproxy.errors import ArtifactError, MissingExtraError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509 import Certificate, GeneralName

CA_DAYS, SERVER_DAYS = 3650, 365
"""How long the certificates of an authority and of a server are valid."""
_KEY_BYTES = 64 << 10
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")
_NOT_USED = [
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "encipher_only",
    "decipher_only",
]


def make_key() -> "ec.EllipticCurvePrivateKey":
    """Make a private key on P-384.

    Raises:
        MissingExtraError: the library for it is not installed.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise MissingExtraError("making and reading keys", "federation") from error
    return ec.generate_private_key(ec.SECP384R1())


def make_ca(key: "ec.EllipticCurvePrivateKey") -> "Certificate":
    """Make the certificate of an authority that signs server certificates with `key`."""
    return _signed("fedproxy CA", key, None, key, [])


def make_server_certificate(
    key: "ec.EllipticCurvePrivateKey", ca: "Certificate", ca_key: "ec.EllipticCurvePrivateKey", hosts: Sequence[str]
) -> "Certificate":
    """Make the certificate of a server that clients reach by `hosts`, names or IP addresses; the CA's outlasts it.

    Raises:
        UsageError: a host is neither.
    """
    return _signed("fedproxy server", key, ca, ca_key, [_general_name(host) for host in hosts])


def _general_name(host: str) -> "GeneralName":
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host) or host.rpartition(".")[2].isdigit():
            raise UsageError(f"host {host!r}: must be a host name or an IP address, without a port.") from None
        return x509.DNSName(host)


def _signed(
    subject: str,
    key: "ec.EllipticCurvePrivateKey",
    issuer: "Certificate | None",
    issuer_key: "ec.EllipticCurvePrivateKey",
    names: "Sequence[GeneralName]",
) -> "Certificate":
    """A certificate: of an authority if there is no `issuer`, otherwise of a server with `names`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)])
    authority, now = issuer is None, datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=CA_DAYS if authority else SERVER_DAYS)
    uses = {"digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority}
    builder = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(end if issuer is None else min(end, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(x509.KeyUsage(**uses, **dict.fromkeys(_NOT_USED, False)), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not authority:
        server = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(server, critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key, hashes.SHA384())


def certificate_pem(certificate: "Certificate") -> bytes:
    """A certificate in PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def private_pem(key: "ec.EllipticCurvePrivateKey") -> bytes:
    """A private key in PEM (PKCS 8), as servers load it."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def private_openssh(key: "ec.EllipticCurvePrivateKey") -> bytes:
    """A private key in OpenSSH's format."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def public_openssh(key: "ec.EllipticCurvePublicKey") -> str:
    """A public key in OpenSSH's format, without a comment."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def fingerprint(public_key: str) -> str:
    """SHA-256 of a public key in OpenSSH's format, written as `ssh-keygen -l` does."""
    digest = hashlib.sha256(base64.b64decode(public_key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def fingerprint_of_pem(public_key: str) -> str:
    """The fingerprint of a public key in PEM."""
    return fingerprint(public_openssh(_loader("load_pem_public_key")(public_key.encode())))


def read_small(path: Path) -> bytes:
    """Read a file of a key or certificate.

    Raises:
        ArtifactError: it is missing, or larger than any key.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_KEY_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error
    if len(content) > _KEY_BYTES:
        raise ArtifactError(f"{path} is no key or certificate: it is larger than {_KEY_BYTES >> 10} KiB.")
    return content


def check_public_key(content: bytes, what: str | Path) -> str:
    """Return a public key in OpenSSH's format without its comment, after checking that Flower takes it.

    Raises:
        ArtifactError: `content` is no public key on a NIST curve.
    """
    make = _loader("load_ssh_public_key")
    key = _loaded(lambda: make(content), what, "public key in OpenSSH's format")
    return public_openssh(key)


def load_public(text: str) -> "ec.EllipticCurvePublicKey":
    """The public key that `check_public_key` gave."""
    key: ec.EllipticCurvePublicKey = _loader("load_ssh_public_key")(text.encode())
    return key


def load_private(content: bytes) -> "ec.EllipticCurvePrivateKey":
    """The private key that `private_openssh` or `read_client_key` gave."""
    key: ec.EllipticCurvePrivateKey = _loader("load_ssh_private_key")(content, None)
    return key


def check_private_key(content: bytes, what: str | Path) -> None:
    """Check that `content` is a private key in OpenSSH's format, on a NIST curve and without a passphrase.

    Raises:
        ArtifactError: it is not.
    """
    make = _loader("load_ssh_private_key")
    _loaded(lambda: make(content, None), what, "private key in OpenSSH's format without a passphrase")


def load_ca_key(content: bytes, ca: "Certificate", what: str | Path) -> "ec.EllipticCurvePrivateKey":
    """The private key with which the authority `ca` signs.

    Raises:
        ArtifactError: `content` is another key, or none in PEM without a passphrase.
    """
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        key: ec.EllipticCurvePrivateKey = _loader("load_pem_private_key")(content, None)
        if key.public_key() != ca.public_key():
            raise ValueError("it belongs to another certificate")
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ArtifactError(f"{what} is not the CA's private key in PEM ({str(error).rstrip('.')}).") from error
    return key


def load_certificate(content: bytes, what: str | Path) -> "Certificate":
    """The certificate in `content`, valid still or no more.

    Raises:
        ArtifactError: it is none in PEM.
    """
    make_key()
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise ArtifactError(f"{what} holds no certificate in PEM, or a damaged one. Get a fresh copy.") from error


def hosts_of(certificate: "Certificate") -> list[str]:
    """The names and IP addresses that a server's certificate is for."""
    from cryptography import x509

    return [
        str(name.value) for name in certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    ]


def check_certificate(content: bytes, what: str | Path) -> bytes:
    """Return `content` after checking that it is a certificate in PEM, still valid.

    Raises:
        ArtifactError: it is not.
    """
    certificate = load_certificate(content, what)
    if certificate.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
        raise ArtifactError(f"{what}: the certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}.")
    return content


def _loader(name: str) -> Any:
    make_key()
    from cryptography.hazmat.primitives import serialization

    return getattr(serialization, name)


def _loaded(load: Any, what: str | Path, kind: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = load()
        if not isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
            raise ValueError("it is no ECDSA key")
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ArtifactError(
            f"{what} holds no {kind} on a NIST curve ({str(error).rstrip('.')}). "
            "Make one with `fedproxy keys new FILE` or `ssh-keygen -t ecdsa -b 384`."
        ) from error
    return key
