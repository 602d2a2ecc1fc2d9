"""A member of secure sums: what it sends in each message, and what it refuses."""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedproxy.errors import SumsError, UsageError
from fedproxy.privacy.sums import protocol
from fedproxy.privacy.sums.identity import Identity
from fedproxy.privacy.sums.protocol import Advert, Answer, Packet, Secrets, encoded
from fedproxy.privacy.sums.ring import add_mask, check_words
from fedproxy.privacy.sums.shares import split

_NONCE = bytes(12)
"""Always the same: every key seals one packet only."""


class Member:
    """One member's side of one setup and its sums; the messages are those of `protocol`, in their order.

    Args:
        identity: Its registered key, and its peers'.
        context: What run, round and attempt this is for.
        labels: The sums, in the order in which they are opened.
        least: So many members must take part.
        max_lost: So many members may be lost between the opening of one label and that of a later one; None for any.
        agreement: Whether it reveals only what as many members as the threshold signed (message 4).
    """

    def __init__(
        self,
        identity: Identity,
        context: bytes,
        labels: Sequence[str],
        *,
        least: int = 3,
        max_lost: int | None = None,
        agreement: bool = False,
    ) -> None:
        if not labels or len(set(labels)) < len(labels):
            raise UsageError(
                f"the labels of secure sums are {list(labels)}; they must be several different ones, or one."
            )
        self._identity, self._name, self._context, self._labels = identity, identity.name, context, tuple(labels)
        self._least, self._max_lost, self._agreement = least, max_lost, agreement
        self._sealing = os.urandom(protocol.KEY_BYTES)
        self._secrets = {
            label: Secrets(os.urandom(protocol.SEED_BYTES), os.urandom(protocol.KEY_BYTES)) for label in labels
        }
        self._adverts: dict[str, Advert] = {}
        self._packets: dict[str, bytes] = {}
        self._held: dict[str, dict[str, Secrets]] = {}
        self._survivors: dict[str, frozenset[str]] = {}
        self._transcript, self._threshold = b"", 0
        self._advert = self._made_advert()

    def advertise(self) -> bytes:
        """Message 1: its public keys."""
        return self._advert

    def share(self, adverts: Mapping[str, bytes], threshold: int) -> dict[str, bytes]:
        """Message 2: its shares, a sealed packet for each other member.

        Args:
            adverts: All members' adverts, its own among them.
            threshold: So many members are needed to open a sum.

        Raises:
            SumsError: the group is too small, the threshold impossible, or an advert is not its member's.
        """
        if self._adverts:
            raise SumsError("The server asked for shares twice.")
        if len(adverts) < self._least:
            raise SumsError(f"{len(adverts)} members take part in a secure sum; this one asks for {self._least}.")
        if not len(adverts) < 2 * threshold <= 2 * len(adverts):
            raise SumsError(
                f"The threshold {threshold} of {len(adverts)} members must be above half of them, and at most all."
            )
        if adverts.get(self._name) != self._advert:
            raise SumsError("The server shows others another advert of this member than it sent.")
        read = {name: self._read_advert(name, advert) for name, advert in sorted(adverts.items())}
        bound_to = protocol.transcript(self._context, self._labels, threshold, adverts)
        self._adverts, self._threshold, self._transcript = read, threshold, bound_to
        dealt = self._dealt()
        self._held[self._name] = dealt.pop(self._name)
        return {holder: self._sealed(holder, shares) for holder, shares in dealt.items()}

    def mask(
        self, label: str, words: np.ndarray, packets: Mapping[str, bytes] | None = None, terms: bytes = b""
    ) -> np.ndarray:
        """Message 3: its words for a label under their masks. It keeps neither words nor, afterwards, the label's keys.

        Args:
            label: The sum.
            words: Words, uint32 [k].
            packets: What others sealed for this member, which fixes who takes part; for later labels the same or none.
            terms: What its words follow from, and must be the same for all: with other terms there is no sum.

        Returns:
            The masked words, uint32 [k].

        Raises:
            SumsError: too few members take part, a packet cannot be opened, or the label was masked before.
            UsageError: these are no words.
        """
        self._check_label(label)
        if label not in self._secrets:
            raise SumsError(f"The server asked twice for masked words of {label!r}.")
        try:
            masked = check_words(words).copy()
        except ValueError as error:
            raise UsageError(f"{label!r}: {error}.") from error
        if not self._packets:
            self._open(packets or {})
        elif packets and packets != self._packets:
            raise SumsError("The server changed who takes part between two sums of one setup.")
        bound_to = protocol.under(self._transcript, terms)
        keys = {peer: self._pair_key(label, peer, bound_to) for peer in self._packets}
        own = self._secrets.pop(label)
        add_mask(masked, protocol.self_mask_key(own.seed, bound_to, label, self._name))
        for peer, key in keys.items():
            add_mask(masked, key, subtract=self._name > peer)
        return masked

    def agree(self, label: str, survivors: Collection[str]) -> bytes:
        """Message 4: its signature that these members survived, of those whose packets it got.

        Raises:
            SumsError: as of `reveal`.
        """
        self._check_survivors(label, frozenset(survivors))
        return self._identity.sign(self._agreement_statement(label))

    def reveal(self, label: str, survivors: Collection[str], agreements: Mapping[str, bytes] | None = None) -> bytes:
        """Message 5: of each survivor the share of its self-mask seed, of each lost member the share of its key.

        Args:
            label: The sum to be opened.
            survivors: Members whose masked words are in the sum.
            agreements: Survivors' messages 4; needed only by a member that asks for them.

        Raises:
            SumsError: this member or too many others are not among the survivors, a survivor takes no part, another
                set was answered before, the set does not fit that of another label, or too few members signed it.
        """
        survivors = frozenset(survivors)
        self._check_survivors(label, survivors)
        if self._agreement:
            self._check_agreements(label, agreements or {})
        lost = self._held.keys() - survivors
        seeds = {name: self._held[name][label].seed for name in survivors}
        return encoded(Answer(seeds, {name: self._held[name][label].key for name in lost}))

    def _made_advert(self) -> bytes:
        sealing = protocol.public_key(self._sealing)
        labels = {
            label: Secrets(
                protocol.seed_commitment(self._context, label, self._name, own.seed), protocol.public_key(own.key)
            )
            for label, own in self._secrets.items()
        }
        statement = protocol.advert_statement(self._context, self._name, sealing, labels)
        return encoded(Advert(sealing, labels, self._identity.sign(statement)))

    def _read_advert(self, name: str, data: bytes) -> Advert:
        with _blaming(name, "advert"):
            advert = Advert.decode(data, self._labels)
        statement = protocol.advert_statement(self._context, name, advert.sealing, advert.labels)
        self._identity.verify(name, statement, advert.signature)
        return advert

    def _dealt(self) -> dict[str, dict[str, Secrets]]:
        """The shares of this member's secrets by holder and label; holders have their points in the order of names."""
        dealt: dict[str, dict[str, Secrets]] = {name: {} for name in self._adverts}
        for label, own in self._secrets.items():
            seeds, keys = (split(secret, self._threshold, len(dealt)) for secret in (own.seed, own.key))
            for name, seed, key in zip(dealt, seeds, keys, strict=True):
                dealt[name][label] = Secrets(seed, key)
        return dealt

    def _sealed(self, holder: str, shares: Mapping[str, Secrets]) -> bytes:
        commitments = {label: self._commitments(label, self._name, holder, each) for label, each in shares.items()}
        with _blaming(holder, "advert"):
            key = protocol.sealing_key(
                self._sealing, self._adverts[holder].sealing, self._transcript, self._name, holder
            )
        sealed = ChaCha20Poly1305(key).encrypt(_NONCE, protocol.packed(shares, self._labels), None)
        return encoded(Packet(commitments, sealed))

    def _open(self, packets: Mapping[str, bytes]) -> None:
        """Take the shares out of all packets, which fixes who takes part."""
        if not self._adverts:
            raise SumsError("The server asked for masked words before shares.")
        if strangers := packets.keys() - (self._adverts.keys() - {self._name}):
            raise SumsError(f"{min(strangers)}: the server passes on a packet of someone who takes no part.")
        if len(packets) + 1 < self._threshold:
            raise SumsError(
                f"Only {len(packets) + 1} members have shared their keys; the threshold is {self._threshold}."
            )
        opened = {dealer: self._shares_in(dealer, packet) for dealer, packet in packets.items()}
        self._held.update(opened)
        self._packets = dict(packets)

    def _shares_in(self, dealer: str, data: bytes) -> dict[str, Secrets]:
        with _blaming(dealer, "packet"):
            packet = Packet.decode(data, self._labels)
            key = protocol.sealing_key(
                self._sealing, self._adverts[dealer].sealing, self._transcript, dealer, self._name
            )
            opened = ChaCha20Poly1305(key).decrypt(_NONCE, packet.sealed, None)
            shares = protocol.unpacked(opened, self._labels)
            for label, each in shares.items():
                if self._commitments(label, dealer, self._name, each) != packet.commitments[label]:
                    raise ValueError("its commitments are not those of the shares in it")
        return shares

    def _commitments(self, label: str, dealer: str, holder: str, shares: Secrets) -> Secrets:
        seed, key = (
            protocol.share_commitment(self._transcript, label, kind, dealer, holder, share)
            for kind, share in (("seed", shares.seed), ("key", shares.key))
        )
        return Secrets(seed, key)

    def _pair_key(self, label: str, peer: str, bound_to: bytes) -> bytes:
        with _blaming(peer, "advert"):
            return protocol.pair_mask_key(
                self._secrets[label].key,
                self._adverts[peer].labels[label].key,
                bound_to,
                label,
                self._name,
                peer,
            )

    def _check_label(self, label: str) -> None:
        if label not in self._labels:
            raise SumsError(f"The server asked for {label!r:.80}, which is none of {', '.join(self._labels)}.")

    def _check_survivors(self, label: str, survivors: frozenset[str]) -> None:
        """Check all that a member can of a set of survivors, and hold it to be that of the label from now on."""
        self._check_label(label)
        if label in self._secrets:
            raise SumsError(f"The server wants to open {label!r}, for which this member has sent nothing.")
        if strangers := survivors - self._held.keys():
            raise SumsError(f"{min(strangers)}: the server calls someone a survivor who takes no part.")
        if self._name not in survivors:
            raise SumsError(f"The server says that this member was lost, and asks it to open {label!r}.")
        if len(survivors) < self._threshold:
            raise SumsError(f"Only {len(survivors)} members are left of {label!r}; the threshold is {self._threshold}.")
        if self._survivors.get(label, survivors) != survivors:
            raise SumsError(f"The server named other survivors of {label!r} before.")
        place = self._labels.index(label)
        for other, there in self._survivors.items():
            earlier, later = (there, survivors) if self._labels.index(other) <= place else (survivors, there)
            if not later <= earlier:
                raise SumsError(
                    f"{min(later - earlier)}: the server says it was lost in one sum and is there in a later one."
                )
            if self._max_lost is not None and len(earlier) - len(later) > self._max_lost:
                raise SumsError(
                    f"{len(earlier) - len(later)} members were lost between {other!r} and {label!r}; "
                    f"{self._max_lost} may be."
                )
        self._survivors[label] = survivors

    def _agreement_statement(self, label: str) -> bytes:
        return protocol.agreement_statement(self._transcript, label, self._held, self._survivors[label])

    def _check_agreements(self, label: str, agreements: Mapping[str, bytes]) -> None:
        statement, others = self._agreement_statement(label), []
        for name in self._survivors[label] & agreements.keys():
            try:
                self._identity.verify(name, statement, agreements[name])
            except SumsError:
                others.append(name)
        signed = len(self._survivors[label] & agreements.keys()) - len(others)
        if signed < self._threshold:
            raise SumsError(
                f"{signed} members signed who survived of {label!r}; the threshold is {self._threshold}. "
                f"Signatures of something else: {', '.join(sorted(others)) or 'none'}."
            )


@contextlib.contextmanager
def _blaming(name: str, what: str) -> Iterator[None]:
    """Make errors of what a member sent, or the server in its name, errors that name the member."""
    try:
        yield
    except InvalidTag as error:
        raise SumsError(f"{name}: its {what} is not for this member, run, round, attempt and group.") from error
    except ValueError as error:
        raise SumsError(f"{name}: its {what} cannot be used: {error}.") from error
