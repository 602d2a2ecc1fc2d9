"""A client's part in the secure sums of a run: its keys of a round, its masked words, and what it reveals once.

A second sum of the same round over other clients would give the difference of both away. So a client helps to open each
sum once, and what it helped to open is on the disk before its answer leaves. What a round needs between its steps stays
in memory: a client that was started anew is out of the round.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedproxy.aggregation.sums import agreeing, agreement, elected, kept, signs
from fedproxy.artifacts import read_json, write_json
from fedproxy.errors import ArtifactError, FederationError, SumsError
from fedproxy.federation.messages import WORDS, Ask, Order, Reply, Told
from fedproxy.federation.secure.form import MAX_LOST, SIGNS, VALUES, Form, context, least, threshold
from fedproxy.federation.secure.round import flattened, signs_of
from fedproxy.privacy.randomness import Randomness
from fedproxy.privacy.sums.fixed_point import packed_counts, quantised, value_bits
from fedproxy.privacy.sums.identity import Identity
from fedproxy.privacy.sums.member import Member

_REVEALED = "revealed.json"


class _Attempt:
    """What a client holds of an attempt at a round, until the next begins."""

    def __init__(self, identity: Identity, start: str, order: Order, ask: Ask, form: Form) -> None:
        self.key = (order.round, ask.attempt)
        self.member = Member(identity, context(start, *self.key), form.labels, max_lost=MAX_LOST, agreement=True)
        self.members = 0
        self.voters = 0
        self.update = torch.empty(0)
        self.cut = torch.empty(0)


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
        self._note = folder / _REVEALED
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
            self._attempt = _Attempt(self._identity, self._start, order, ask, self._form)
            letters = {said.client: self._attempt.member.advertise()}
            return replace(said, letters=letters, numbers={"rows": float(self._rows)})
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
        return self._values(said, attempt, ask)

    def masked(self, order: Order, ask: Ask, reply: Reply) -> Reply:
        """The reply to the round's training, with masked words in place of the update.

        Raises:
            SumsError: as of `told`.
            ArtifactError: the update holds NaN or Inf.
        """
        attempt = self._current(order, ask)
        update = flattened(reply.update)
        norm = float(update.double().norm())
        attempt.update = update * min(1.0, self._form.bound / norm) if norm > 0 else update
        attempt.cut = kept(attempt.update, order.share)
        if ask.label == SIGNS:
            columns = [column.numpy() for column in signs(attempt.update, attempt.cut)]
            words = packed_counts(columns, attempt.members)
        else:
            words = self._quantised(attempt, attempt.update, ask)
        masked = attempt.member.mask(ask.label, words, ask.letters)
        return replace(reply, update=_words(masked), size=masked.nbytes, parcel=None)

    def _values(self, told: Told, attempt: _Attempt, ask: Ask) -> Told:
        """The masked values of the second sum, of the coordinates that the first one elected the client's sign for."""
        if ask.label != VALUES or ask.counts is None or ask.counts.shape != attempt.update.shape:
            raise FederationError(f"the sum of signs has not the {attempt.update.numel()} counts of the update.")
        counted = signs_of(ask.counts.numpy(), attempt.members)
        values = attempt.update
        if self._form.elects:
            values = agreeing(attempt.cut, elected(counted, self._form.rho, least(ask.threshold)))
        masked = attempt.member.mask(ask.label, self._quantised(attempt, values, ask), {})
        return replace(
            told, words=_words(masked), numbers={"agreement": agreement(attempt.update, counted, attempt.voters)}
        )

    def _quantised(self, attempt: _Attempt, values: torch.Tensor, ask: Ask) -> np.ndarray:
        draws, scaled = Randomness(), values.double() * ask.weight
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
        number, survivors = attempt.key[0], sorted(ask.letters)
        noted: Any = read_json(self._note) if self._note.exists() else {"round": 0, "sums": {}}
        try:
            before, sums = int(noted["round"]), dict(noted["sums"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{self._note} is no note of what was revealed.") from error
        if before > number or (before == number and sums.get(ask.label, survivors) != survivors):
            raise SumsError(
                f"the sum {ask.label} of round {number} was opened before, over other clients: both together would "
                "give single updates away."
            )
        said = attempt.member.reveal(ask.label, survivors, {name: sign for name, sign in ask.letters.items() if sign})
        attempt.voters = len(survivors)
        self._note.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._note, {"round": number, "sums": {**(sums if before == number else {}), ask.label: survivors}})
        return said


def _words(words: np.ndarray) -> dict[str, torch.Tensor]:
    return {WORDS: torch.from_numpy(words)}
