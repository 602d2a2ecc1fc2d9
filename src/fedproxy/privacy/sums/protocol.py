"""The messages of a secure sum, and what is derived of which secret.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, figure 4. One setup
(messages 1 and 2) serves several sums, the labels. Each label has keys, a seed and shares of its own, because the
opening of one sum gives away the keys that lost members had for it.

    1 advertise  member → all      public keys, commitments to its self-mask seeds, signed with its registered key
    2 share      member → members  Shamir's shares of its seeds and private keys, sealed for each holder
                                   U2: the members whose packets arrived
    3 mask       member → server   y_u = x_u + PRG(b_u) + Σ_{v ∈ U2, u < v} PRG(s_uv) - Σ_{v ∈ U2, u > v} PRG(s_uv)
                                   S ⊆ U2: the survivors, whose masked words arrived
    4 agree      member → members  its signature under U2 and S (figure 4's consistency check)
    5 reveal     member → server   of each survivor its share of b, of each other member of U2 its share of the key
    opening      server            Σ_{u ∈ S} x_u, all modulo 2^32: b_u and, of lost members, s_uv are combined of shares

b_u is the self-mask seed, s_uv the X25519 agreement of u's and v's keys of the label.

| who                      | knows of member u                                                                      |
|--------------------------|----------------------------------------------------------------------------------------|
| u                        | its words (only while it masks), its seeds and keys                                    |
| another member           | its public keys; one share of each of its secrets; s_uv of its own pair                |
| server                   | its public keys, masked words, then b_u or, if it was lost, its keys of that label     |
| server, at the end       | the survivors' sum of each label, and who survived                                     |
| who hears the wire       | what the server knows, without transport encryption                                    |

What a lying server can do. Packets, masks and shares are bound to a digest of the context, the threshold t and all
adverts, so members who are shown different ones cannot work together. A member answers once for each label, and
t > n/2. So nobody's b_u and key of a label both come out: each needs t of n members, and each member gives one kind.
With c members on the server's side that asks for t > (n + c)/2.

This does not suffice against a server that tells members of different U2 and S. With n = 5 and t = 3 it can get the
keys of everyone that one member masked with, and b of that member (tests/privacy/sums/test_lies.py). Message 4 prevents
it: a member reveals only what t members signed, and of two different (U2, S) of one label only one can have t
signatures. Without message 4 take t ≥ 2n/3: then no member's words come out alone, but sums over fewer than t members
may.

What no protocol prevents. Two sums over nearly the same members tell their difference, so who takes part with the same
words in a second attempt gives that difference away. Of a sum over few, each of the few learns the sum of the others.
"""

import base64
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SEED_BYTES, KEY_BYTES, DIGEST_BYTES = 16, 32, 32
"""Bytes of a self-mask seed, of an X25519 key, and of SHA-256."""
SIGNATURE_BYTES = range(8, 161)
"""Bytes that an ECDSA signature in DER may have on curves up to 521 bits."""
_TAG_BYTES = 16
_MOST_ADVERT, _MOST_PACKET, _MOST_ANSWER = 64 << 10, 64 << 10, 4 << 20
_PURPOSE = "fedproxy secure sums 1"

Shape = int | range | Mapping[str, "Shape"]


@dataclass(frozen=True)
class Secrets:
    """What belongs to a member's self-mask seed and to its private key of a label: secrets, shares, or commitments.

    Attributes:
        seed: Of the self-mask seed.
        key: Of the private key; in an advert the public key.
    """

    seed: bytes
    key: bytes


@dataclass(frozen=True)
class Advert:
    """Message 1.

    Attributes:
        sealing: The X25519 key that packets are sealed for.
        labels: For each label the public key and the commitment to the self-mask seed.
        signature: Of `advert_statement`, by the registered key.
    """

    sealing: bytes
    labels: dict[str, Secrets]
    signature: bytes

    @staticmethod
    def decode(data: bytes, labels: Collection[str]) -> "Advert":
        """Read an advert for these labels.

        Raises:
            ValueError: it is none.
        """
        each = {"seed": DIGEST_BYTES, "key": KEY_BYTES}
        shape: Shape = {"sealing": KEY_BYTES, "labels": dict.fromkeys(labels, each), "signature": SIGNATURE_BYTES}
        said = _decoded(data, shape, _MOST_ADVERT)
        return Advert(said["sealing"], _by_label(said["labels"]), said["signature"])


@dataclass(frozen=True)
class Packet:
    """What one member has for another in message 2.

    Attributes:
        commitments: For each label the `share_commitment` of both shares, which the server can read, too.
        sealed: Both shares of each label, encrypted for the holder.
    """

    commitments: dict[str, Secrets]
    sealed: bytes

    @staticmethod
    def decode(data: bytes, labels: Collection[str]) -> "Packet":
        """Read a packet for these labels.

        Raises:
            ValueError: it is none.
        """
        each = {"seed": DIGEST_BYTES, "key": DIGEST_BYTES}
        sealed = len(labels) * (SEED_BYTES + KEY_BYTES) + _TAG_BYTES
        said = _decoded(data, {"commitments": dict.fromkeys(labels, each), "sealed": sealed}, _MOST_PACKET)
        return Packet(_by_label(said["commitments"]), said["sealed"])


@dataclass(frozen=True)
class Answer:
    """Message 5.

    Attributes:
        seeds: The answerer's share of each survivor's self-mask seed.
        keys: Its share of each lost member's private key.
    """

    seeds: dict[str, bytes]
    keys: dict[str, bytes]

    @staticmethod
    def decode(data: bytes, survivors: Collection[str], lost: Collection[str]) -> "Answer":
        """Read an answer about these members.

        Raises:
            ValueError: it is none.
        """
        shape: Shape = {"seeds": dict.fromkeys(survivors, SEED_BYTES), "keys": dict.fromkeys(lost, KEY_BYTES)}
        return Answer(**_decoded(data, shape, _MOST_ANSWER))


def encoded(payload: Advert | Packet | Answer) -> bytes:
    """A payload's only form as bytes: JSON with sorted keys, without white space, bytes in base64."""
    return _json(asdict(payload))


def packed(shares: Mapping[str, Secrets], labels: Sequence[str]) -> bytes:
    """What is sealed in a packet: for each label, in order, the seed's share and the key's."""
    return b"".join(shares[label].seed + shares[label].key for label in labels)


def unpacked(data: bytes, labels: Sequence[str]) -> dict[str, Secrets]:
    """The shares in an opened packet."""
    size = SEED_BYTES + KEY_BYTES
    parts = {label: data[place * size : (place + 1) * size] for place, label in enumerate(labels)}
    return {label: Secrets(part[:SEED_BYTES], part[SEED_BYTES:]) for label, part in parts.items()}


def advert_statement(context: bytes, name: str, sealing: bytes, labels: Mapping[str, Secrets]) -> bytes:
    """What the signature in an advert is of."""
    return digest("advert", context, name, sealing, {label: asdict(keys) for label, keys in labels.items()})


def agreement_statement(transcript: bytes, label: str, members: Collection[str], survivors: Collection[str]) -> bytes:
    """What a member signs in message 4."""
    return digest("agreement", transcript, label, sorted(members), sorted(survivors))


def transcript(context: bytes, labels: Sequence[str], threshold: int, adverts: Mapping[str, bytes]) -> bytes:
    """What all that follows the adverts is bound to."""
    return digest("transcript", context, list(labels), threshold, dict(adverts))


def seed_commitment(context: bytes, label: str, name: str, seed: bytes) -> bytes:
    """What an advert says of a self-mask seed, whose 128 random bits nobody finds by trying."""
    return digest("seed", context, label, name, seed)


def share_commitment(transcript: bytes, label: str, kind: str, dealer: str, holder: str, share: bytes) -> bytes:
    """What a packet says openly of a share, so that a false one is its holder's fault and no one else's.

    Args:
        transcript: As of `transcript`.
        label: The sum it is for.
        kind: "seed" or "key".
        dealer: Whose secret it is of.
        holder: Who holds it.
        share: The share, which is uniform, of 128 bits at least.
    """
    return digest("share", transcript, label, kind, dealer, holder, share)


def under(transcript: bytes, terms: bytes) -> bytes:
    """What the masks of a sum are bound to: members who were asked on other terms have masks that do not cancel.

    Args:
        transcript: As of `transcript`.
        terms: What all members of the sum must have been told alike; nothing if there is no such thing.
    """
    return digest("terms", transcript, terms) if terms else transcript


def self_mask_key(seed: bytes, transcript: bytes, label: str, name: str) -> bytes:
    """The ChaCha20 key of a member's own mask."""
    return _derived(seed, "self mask", transcript, label, name)


def pair_mask_key(private: bytes, public: bytes, transcript: bytes, label: str, *pair: str) -> bytes:
    """The ChaCha20 key of the mask that two members share.

    Raises:
        ValueError: the public key is of small order.
    """
    return _derived(_agreed(private, public), "pair mask", transcript, label, *sorted(pair))


def sealing_key(private: bytes, public: bytes, transcript: bytes, dealer: str, holder: str) -> bytes:
    """The key of one packet.

    Raises:
        ValueError: the public key is of small order.
    """
    return _derived(_agreed(private, public), "packet", transcript, dealer, holder)


def public_key(private: bytes) -> bytes:
    """The X25519 public key of a private key's 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def digest(*parts: Any) -> bytes:
    """SHA-256 of the parts, each in its place, and of this protocol's name."""
    return hashlib.sha256(_json([_PURPOSE, *parts])).digest()


def _agreed(private: bytes, public: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


def _derived(secret: bytes, *parts: Any) -> bytes:
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=digest(*parts)).derive(secret)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_base64).encode()


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _decoded(data: bytes, shape: Shape, most: int) -> dict[str, Any]:
    """The value in its only form, of the shape given: objects with exactly these keys, and bytes of these lengths."""
    if len(data) > most:
        raise ValueError(f"{len(data)} bytes are more than the {most} that are read")
    try:
        value: dict[str, Any] = _fitted(json.loads(data), shape)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if _json(value) != data:
        raise ValueError("it is not in its only form")
    return value


def _fitted(value: Any, shape: Shape) -> Any:
    if isinstance(shape, Mapping):
        if not isinstance(value, dict) or value.keys() != shape.keys():
            raise ValueError("a part is missing, or one too many")
        return {key: _fitted(value[key], part) for key, part in shape.items()}
    found = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    if len(found) not in (shape if isinstance(shape, range) else (shape,)):
        raise ValueError("a part is of a wrong length")
    return found


def _by_label(values: Mapping[str, Mapping[str, bytes]]) -> dict[str, Secrets]:
    return {label: Secrets(**each) for label, each in values.items()}
