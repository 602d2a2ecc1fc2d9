"""The server's side of secure sums: it passes messages on, adds masked words up, and opens the sum."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fedproxy.errors import ArtifactError, SumsError, UsageError
from fedproxy.privacy.sums import protocol
from fedproxy.privacy.sums.protocol import Advert, Answer, Packet, Secrets
from fedproxy.privacy.sums.ring import add_mask, check_words
from fedproxy.privacy.sums.shares import combined


class _Sum:
    """What the server has of one label.

    Attributes:
        total: The sum of all masked words so far, uint32 [k].
        names: Whose words are in it.
        closed: Whether the survivors were named.
        agreements: Their messages 4.
        answers: Their messages 5.
    """

    def __init__(self) -> None:
        self.total = np.zeros(0, np.uint32)
        self.names: list[str] = []
        self.closed = False
        self.agreements: dict[str, bytes] = {}
        self.answers: dict[str, Answer] = {}


class Tally:
    """The server's side of one setup and its sums; the messages are those of `protocol`, in their order.

    Each reading of what a step has brought (`adverts`, `packets_for`, `survivors`) closes that step: whoever comes
    later takes no part in it.

    Args:
        context: What run, round and attempt this is for.
        labels: The sums, in the order in which they are opened.
        threshold: So many members are needed to open a sum.
    """

    def __init__(self, context: bytes, labels: Sequence[str], threshold: int) -> None:
        self._context, self._labels, self._threshold = context, tuple(labels), threshold
        self._adverts: dict[str, bytes] = {}
        self._read: dict[str, Advert] = {}
        self._packets: dict[str, dict[str, bytes]] = {}
        self._commitments: dict[str, dict[str, dict[str, Secrets]]] = {}
        self._sums = {label: _Sum() for label in self._labels}
        self._advertising, self._sharing, self._transcript = True, True, b""

    def advertised(self, name: str, advert: bytes) -> None:
        """Take a member's message 1.

        Raises:
            ArtifactError: it is none, comes twice or too late.
        """
        with _blaming(name, "advert"):
            _require(self._advertising, "it came too late")
            _require(name not in self._adverts, "it came twice")
            self._read[name] = Advert.decode(advert, self._labels)
        self._adverts[name] = advert

    def adverts(self) -> dict[str, bytes]:
        """All adverts, for every member; no more are taken."""
        if self._advertising:
            self._transcript = protocol.transcript(self._context, self._labels, self._threshold, self._adverts)
        self._advertising = False
        return dict(self._adverts)

    def shared(self, name: str, packets: Mapping[str, bytes]) -> None:
        """Take a member's message 2.

        Raises:
            ArtifactError: it is none, comes twice or too late, or it is not a packet for each other member.
        """
        with _blaming(name, "message of shares"):
            _require(not self._advertising and self._sharing, "it came at a wrong time")
            _require(name in self._adverts, "it sent no advert")
            _require(name not in self._packets, "it came twice")
            _require(packets.keys() == self._adverts.keys() - {name}, "it is not for all other members")
            read = {holder: Packet.decode(packet, self._labels) for holder, packet in packets.items()}
        self._commitments[name] = {holder: packet.commitments for holder, packet in read.items()}
        self._packets[name] = dict(packets)

    def packets_for(self, name: str) -> dict[str, bytes]:
        """What all others sealed for a member; no more packets are taken from anybody."""
        self._sharing = False
        return {dealer: packets[name] for dealer, packets in self._packets.items() if dealer != name}

    def masked(self, label: str, name: str, words: np.ndarray) -> None:
        """Add a member's message 3 to the sum. The first member's says how long all are, so check it before.

        Raises:
            ArtifactError: it is none, comes twice, too late, or of someone who was lost before.
        """
        place = self._sum(label)
        with _blaming(name, f"message of masked words of {label!r}"):
            _require(not self._sharing and name in self._packets, "it shared no keys")
            _require(not place.closed, "it came too late")
            _require(name not in place.names, "it came twice")
            before = self._labels[: self._labels.index(label)]
            _require(all(name in self._sums[each].names for each in before), "it has no part in an earlier sum")
            check_words(words)
            if not place.names:
                place.total = np.zeros(len(words), np.uint32)
            _require(len(words) == len(place.total), f"it has {len(words)} words, others {len(place.total)}")
        place.total += words
        place.names.append(name)

    def survivors(self, label: str) -> tuple[str, ...]:
        """The members whose masked words are in the sum, by name; no more are added."""
        place = self._sum(label)
        place.closed = True
        return tuple(sorted(place.names))

    def agreed(self, label: str, name: str, signature: bytes) -> None:
        """Take a survivor's message 4, which only members can check.

        Raises:
            ArtifactError: it is none, or of someone else.
        """
        place = self._sum(label)
        with _blaming(name, f"agreement on {label!r}"):
            _require(place.closed and name in place.names, "it is no survivor")
            _require(len(signature) in protocol.SIGNATURE_BYTES, "it is no signature")
        place.agreements[name] = signature

    def agreements(self, label: str) -> dict[str, bytes]:
        """The messages 4 so far, for every survivor."""
        return dict(self._sum(label).agreements)

    def revealed(self, label: str, name: str, answer: bytes) -> None:
        """Take a survivor's message 5.

        Raises:
            ArtifactError: it is none, of someone else, or a share is not what the holder got.
        """
        place = self._sum(label)
        with _blaming(name, f"answer on {label!r}"):
            _require(place.closed and name in place.names, "it is no survivor")
            read = Answer.decode(answer, place.names, self._packets.keys() - set(place.names))
            for kind, shares in (("seed", read.seeds), ("key", read.keys)):
                for dealer in shares.keys() - {name}:
                    found = protocol.share_commitment(self._transcript, label, kind, dealer, name, shares[dealer])
                    promised = getattr(self._commitments[dealer][name][label], kind)
                    _require(found == promised, f"it is not the share that {dealer} gave it")
        place.answers[name] = read

    def opened(self, label: str, terms: bytes = b"") -> np.ndarray:
        """The sum of the survivors' words.

        Args:
            label: The sum.
            terms: Those that its members masked on.

        Returns:
            The sum modulo 2^32, uint32 [k].

        Raises:
            SumsError: fewer members than the threshold have answered, or a member dealt shares of something else than
                it had advertised.
        """
        place = self._sum(label)
        if len(place.answers) < self._threshold:
            raise SumsError(f"{len(place.answers)} members opened {label!r}; the threshold is {self._threshold}.")
        bound_to, total = protocol.under(self._transcript, terms), place.total.copy()
        for name in place.names:
            add_mask(total, self._self_mask_key(label, name, bound_to), subtract=True)
        for lost in self._packets.keys() - set(place.names):
            private = self._private_key(label, lost)
            for name in place.names:
                add_mask(total, self._pair_mask_key(label, private, bound_to, lost, name), subtract=name < lost)
        return total

    def _self_mask_key(self, label: str, name: str, bound_to: bytes) -> bytes:
        answers = self._sums[label].answers
        seed = self._combined({holder: answer.seeds[name] for holder, answer in answers.items()})
        if protocol.seed_commitment(self._context, label, name, seed) != self._read[name].labels[label].seed:
            raise SumsError(f"{name}: the shares it dealt are not of the self-mask seed that it had advertised.")
        return protocol.self_mask_key(seed, bound_to, label, name)

    def _private_key(self, label: str, lost: str) -> bytes:
        answers = self._sums[label].answers
        private = self._combined({holder: answer.keys[lost] for holder, answer in answers.items()})
        if protocol.public_key(private) != self._read[lost].labels[label].key:
            raise SumsError(f"{lost}: the shares it dealt are not of the key that it had advertised.")
        return private

    def _pair_mask_key(self, label: str, private: bytes, bound_to: bytes, lost: str, name: str) -> bytes:
        try:
            public = self._read[name].labels[label].key
            return protocol.pair_mask_key(private, public, bound_to, label, lost, name)
        except ValueError as error:
            raise SumsError(f"{name}: the key that it had advertised cannot be used: {error}.") from error

    def _combined(self, shares: Mapping[str, bytes]) -> bytes:
        points = {name: point for point, name in enumerate(sorted(self._adverts), 1)}
        return combined({points[holder]: shares[holder] for holder in sorted(shares)[: self._threshold]})

    def _sum(self, label: str) -> _Sum:
        if label not in self._sums:
            raise UsageError(f"{label!r} is none of the sums {', '.join(self._labels)}.")
        return self._sums[label]


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


@contextlib.contextmanager
def _blaming(name: str, what: str) -> Iterator[None]:
    """Make what is wrong with a message its sender's fault."""
    try:
        yield
    except ValueError as error:
        raise ArtifactError(f"{name}: its {what} is not taken: {error}.") from error
