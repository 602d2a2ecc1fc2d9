"""A client's part in the secure sums of a run: its keys of a round, its masked words, and what it reveals once.

A second sum of the same round over other clients, or of other values, would give the difference of both away. So a
client helps to open each sum once, and what it helped to open is on the disk before its answer leaves. What a round
needs between its steps stays in memory: a client that was started anew is out of the round.
"""

import hashlib
import json
import math
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedproxy.aggregation.sums import agreement, signs
from fedproxy.artifacts import read_json, write_json
from fedproxy.config import read_table, table
from fedproxy.errors import ArtifactError, FederationError, SumsError
from fedproxy.federation.messages import WORDS, Ask, Order, Reply, Told
from fedproxy.federation.secure.form import POSITIVE, Form, context, terms, threshold
from fedproxy.federation.secure.round import flattened, signs_of
from fedproxy.privacy.randomness import Randomness
from fedproxy.privacy.sums.fixed_point import packed_counts, quantised, value_bits
from fedproxy.privacy.sums.identity import Identity
from fedproxy.privacy.sums.member import Member

_NOTE = "sums.json"


class _Attempt:
    """What a client holds of an attempt at a round, until the next begins.

    Attributes:
        key: The round and the attempt.
        member: Its keys.
        own: Its agreement with the others in the round before; none if it has none.
        members: How many advertised keys.
        sharing: How many shared them.
        voters: How many are in the first sum.
        update: τ_k, [P].
        words: Its weighted values, as they were rounded for the first sum, uint32 [P].
        given: By sum, a digest of what its words follow from beside the update.
    """

    def __init__(self, identity: Identity, start: str, order: Order, ask: Ask, form: Form, own: float | None) -> None:
        self.key = (order.round, ask.attempt)
        self.member = Member(identity, context(start, *self.key), form.labels, max_lost=0, agreement=True)
        self.own = own
        self.members = self.sharing = self.voters = 0
        self.update = torch.empty(0)
        self.words = np.empty(0, np.uint32)
        self.given: dict[str, str] = {}


@table
class _Note:
    """What a client keeps of a run.

    Attributes:
        round: The last round of which it opened a sum.
        opened: By sum of that round, over which clients it was, and of what (`_Attempt.given`).
        agreement: By round, the last two, its agreement with the others.
    """

    round: int = 0
    opened: dict[str, list[Any]] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)


class SecureClient:
    """One client in the secure sums of one run.

    Args:
        identity: Its registered key and those of the others.
        form: What is summed.
        start: SHA-256 of the adapter that the run began with.
        rows: The rows that it trains on.
        folder: Where it notes what it revealed.
    """

    def __init__(self, identity: Identity, form: Form, start: str, rows: int, folder: Path) -> None:
        self._identity, self._form, self._start, self._rows = identity, form, start, rows
        self._note = folder / _NOTE
        self._attempt: _Attempt | None = None

    def told(self, order: Order, ask: Ask) -> Told:
        """Answer a step but the training.

        Raises:
            SumsError: the server asks for what would give an update away, or what others sent is not theirs.
            ArtifactError: what was noted is damaged.
            ResourceError: the disk is full.
        """
        said = Told(self._identity.name, order.round, ask.step, ask.label)
        if ask.step == "advertise":
            known = {int(number): value for number, value in self._noted().agreement.items()}
            own = known.get(max((number for number in known if number < order.round), default=0))
            self._attempt = _Attempt(self._identity, self._start, order, ask, self._form, own)
            numbers = {"rows": float(self._rows)} | ({} if own is None else {"agreement": own})
            return replace(said, letters={said.client: self._attempt.member.advertise()}, numbers=numbers)
        attempt = self._current(order, ask)
        if ask.step == "share":
            if ask.threshold < (needed := threshold(len(ask.letters))):
                raise SumsError(
                    f"a sum of {ask.threshold} of {len(ask.letters)} clients is asked for; it needs {needed}."
                )
            attempt.members = len(ask.letters)
            return replace(said, letters=attempt.member.share(ask.letters, ask.threshold))
        if ask.step == "agree":
            return replace(said, letters={said.client: attempt.member.agree(ask.label, sorted(ask.letters))})
        if ask.step == "reveal":
            return replace(said, letters={said.client: self._reveal(attempt, ask)})
        return self._positive(said, attempt, ask)

    def masked(self, order: Order, ask: Ask, reply: Reply) -> Reply:
        """The reply to the round's training, with masked words in place of the update.

        Raises:
            SumsError: as of `told`.
            FederationError: the update holds NaN or Inf.
        """
        attempt = self._current(order, ask)
        update = flattened(reply.update)
        norm = float(update.double().norm())
        if not math.isfinite(norm):
            raise FederationError("the update holds NaN or Inf: the training diverged.")
        attempt.update = update * min(1.0, self._form.bound / norm) if norm > 0 else update
        attempt.sharing = len(ask.letters) + 1
        attempt.words = self._quantised(attempt, ask)
        counts = [column.numpy() for column in signs(attempt.update)]
        before = [packed_counts(counts, attempt.members)] if self._form.signs else []
        masked = self._mask(attempt, ask, np.concatenate([*before, attempt.words]))
        return replace(reply, update=_words(masked), size=masked.nbytes, parcel=None)

    def _positive(self, told: Told, attempt: _Attempt, ask: Ask) -> Told:
        """The masked words of the second sum: those of the first that are positive, at contested coordinates."""
        if ask.label != POSITIVE or ask.counts is None or ask.counts.shape != attempt.update.shape:
            raise FederationError(f"the second sum has not the {attempt.update.numel()} counts of the update.")
        counted = signs_of(ask.counts.numpy(), attempt.members)
        chosen = (counted.contested & (attempt.update > 0)).numpy()
        masked = self._mask(attempt, ask, np.where(chosen, attempt.words, np.uint32(0)))
        said = agreement(attempt.update, counted, attempt.voters)
        note, number = self._noted(), attempt.key[0]
        known = {key: value for key, value in note.agreement.items() if int(key) < number}
        self._keep(
            replace(note, agreement=dict(sorted(known.items(), key=lambda one: int(one[0]))[-1:]) | {str(number): said})
        )
        return replace(told, words=_words(masked), numbers={"agreement": said})

    def _mask(self, attempt: _Attempt, ask: Ask, words: np.ndarray) -> np.ndarray:
        told_all = terms(ask)
        attempt.given[ask.label] = hashlib.sha256(json.dumps(attempt.sharing).encode() + told_all).hexdigest()
        return attempt.member.mask(ask.label, words, ask.letters, told_all)

    def _quantised(self, attempt: _Attempt, ask: Ask) -> np.ndarray:
        own = ask.usual if attempt.own is None else attempt.own
        draws, weight = Randomness(), self._form.weight(self._rows, own, attempt.sharing, ask.top)
        scaled = attempt.update.double() * weight
        if (noise := self._form.noise) is not None:
            scaled += draws.normal(len(scaled)) * noise.deviation(ask.threshold)
        return quantised(scaled.numpy(), self._form.reach(ask.threshold), value_bits(attempt.members), draws)

    def _current(self, order: Order, ask: Ask) -> _Attempt:
        if self._attempt is None or self._attempt.key != (order.round, ask.attempt):
            raise FederationError(
                f"round {order.round}, attempt {ask.attempt}: this client has no keys for it; it was started anew, or "
                "the server left steps out."
            )
        return self._attempt

    def _reveal(self, attempt: _Attempt, ask: Ask) -> bytes:
        """What opens the sum of those whose words came; noted first, and the same for the same round ever after."""
        number, survivors, note = attempt.key[0], sorted(ask.letters), self._noted()
        opened = [survivors, attempt.given.get(ask.label, "")]
        if note.round > number or (note.round == number and note.opened.get(ask.label, opened) != opened):
            raise SumsError(
                f"the sum {ask.label} of round {number} was opened before, over other clients or of other values: both "
                "together would give single updates away."
            )
        said = attempt.member.reveal(ask.label, survivors, {name: sign for name, sign in ask.letters.items() if sign})
        attempt.voters = len(survivors)
        before = note.opened if note.round == number else {}
        self._keep(replace(note, round=number, opened={**before, ask.label: opened}))
        return said

    def _noted(self) -> _Note:
        """What the client keeps of the run.

        Raises:
            ArtifactError: it is damaged.
        """
        if not self._note.exists():
            return _Note()
        problems: list[str] = []
        found: Any = read_table(_Note, read_json(self._note), "", problems)
        if problems or not all(key.isdecimal() for key in found.agreement):
            raise ArtifactError(f"{self._note} is no note of what was revealed.")
        return found  # type: ignore[no-any-return]

    def _keep(self, note: _Note) -> None:
        self._note.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._note, asdict(note))


def _words(words: np.ndarray) -> dict[str, torch.Tensor]:
    return {WORDS: torch.from_numpy(words)}
