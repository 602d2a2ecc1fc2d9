"""The server's part in the secure sums of a round: what each step asks of whom, and what the sums make.

The steps are advertise, share, and for each sum mask, agree and reveal (`privacy.sums.protocol`). The clients train in
the first "mask". Who is gone in one step is not asked in the next. A sum of fewer clients than the threshold is not
opened. The second sum is over the clients of the first; where one of them is gone, the round ends without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedproxy.aggregation.sums import Signs, conflict_levels, heterogeneity, merged
from fedproxy.errors import ArtifactError, FederationError, SumsError
from fedproxy.federation.messages import WORDS, Ask, Order, Reply, Step, Told
from fedproxy.federation.secure.asks import MOST_MEMBERS
from fedproxy.federation.secure.form import POSITIVE, VALUES, Form, context, terms, threshold
from fedproxy.privacy.sums.fixed_point import restored, unpacked_counts, value_bits
from fedproxy.privacy.sums.tally import Tally
from fedproxy.tensors import Tensors, parameter_count


@dataclass(frozen=True)
class Summed:
    """What the sums of a round make.

    Attributes:
        merged: The merged update, in the layout of the adapter, float32.
        levels: K - |Σ sign|, of each coordinate, where signs were summed; else empty.
        analysis: What there is of `aggregation.analyse.Analysis`. After a second sum also the clients' "agreement" with
            the others, and the share of coordinates that it decided, "contested".
    """

    merged: dict[str, torch.Tensor]
    levels: dict[str, torch.Tensor]
    analysis: dict[str, Any]


class SecureRound:
    """One attempt at a round.

    Args:
        orders: The training orders, by client.
        form: What is summed.
        start: SHA-256 of the adapter that the run began with.
        attempt: How often the round was begun before.

    Raises:
        FederationError: they are too many for a sum.
    """

    def __init__(self, orders: Mapping[str, Order], form: Form, *, start: str, attempt: int) -> None:
        if len(orders) > MOST_MEMBERS:
            raise FederationError(
                f"A round with [federate] secure = true asks {len(orders)} clients; a secure sum has {MOST_MEMBERS} at "
                "most. Set participation."
            )
        self._orders, self._form = orders, form
        first = next(iter(orders.values()))
        self._round, self._layout, self._size = first.round, first.adapter, parameter_count(first.adapter)
        self.needed = threshold(len(orders))
        self._plain = Ask("advertise", attempt, threshold=self.needed)
        self._steps: list[tuple[Step, str]] = [("advertise", ""), ("share", "")]
        for label in form.labels:
            self._steps += [("mask", label), ("agree", label), ("reveal", label)]
        self._tally = Tally(context(start, self._round, attempt), form.labels, self.needed)
        self.asked = tuple(sorted(orders))
        self._answered: set[str] = set()
        self._rows: dict[str, int] = {}
        self._before: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._terms: dict[str, bytes] = {}
        self._opened: dict[str, np.ndarray] = {}

    @property
    def step(self) -> tuple[Step, str]:
        """The step, and the sum that it belongs to."""
        return self._steps[0]

    @property
    def trains(self) -> bool:
        """Whether the clients train in the step."""
        return self.step == ("mask", self._form.labels[0])

    @property
    def clients(self) -> tuple[str, ...]:
        """Whose values were summed, sorted."""
        return self._tally.survivors(VALUES)

    def orders(self) -> dict[str, Order]:
        """What the step asks of each client; clients who get the same share one object."""
        step, label = self.step
        ask = replace(self._plain, step=step, label=label)
        if step == "mask" and self.trains:
            self._terms[label] = terms(ask)
            letters = {name: self._tally.packets_for(name) for name in self.asked}
            return {name: replace(self._orders[name], ask=replace(ask, letters=letters[name])) for name in self.asked}
        if step == "mask":
            ask = replace(ask, counts=torch.from_numpy(self._opened[VALUES][: self._size].copy()))
            self._terms[label] = terms(ask)
        if step == "advertise":
            ask = replace(ask, threshold=0)
        elif step == "share":
            ask = replace(ask, letters=self._tally.adverts())
        elif step != "mask":
            signed = self._tally.agreements(label) if step == "reveal" else {}
            ask = replace(ask, letters={name: signed.get(name, b"") for name in self._tally.survivors(label)})
        return dict.fromkeys(self.asked, Order(self._round, {}, trains=False, ask=ask))

    def receive(self, sender: str, answer: Reply | Told) -> None:
        """Take the answer of a client that the step asks.

        Raises:
            ArtifactError, SumsError: it is not what the step asks for.
        """
        step, label = self.step
        if isinstance(answer, Told) and (answer.step, answer.label) != (step, label):
            raise ArtifactError(f"it is of the step {answer.step} {answer.label}, this is {step} {label}")
        if step == "advertise":
            numbers = _numbers(answer, {"rows"}, {"rows", "agreement"})
            if not (rows := numbers["rows"]) >= 1 or rows % 1:
                raise ArtifactError(f"it has {rows:g} rows")
            self._tally.advertised(sender, _letter(answer, sender))
            self._rows[sender] = int(rows)
            if "agreement" in numbers:
                self._before[sender] = numbers["agreement"]
        elif step == "share":
            self._tally.shared(sender, answer.letters if isinstance(answer, Told) else {})
        elif step == "agree":
            self._tally.agreed(label, sender, _letter(answer, sender))
        elif step == "reveal":
            self._tally.revealed(label, sender, _letter(answer, sender))
        else:
            self._take_words(sender, answer, label)
        self._answered.add(sender)

    def _take_words(self, sender: str, answer: Reply | Told, label: str) -> None:
        given = answer.update if isinstance(answer, Reply) else answer.words
        words = given.get(WORDS)
        count = self._form.words(label, self._size)
        if len(given) != 1 or words is None or words.dtype != torch.uint32 or words.shape != (count,):
            raise ArtifactError(f"it sent no {count} masked words")
        if isinstance(answer, Reply) and answer.rows != self._rows[sender]:
            raise ArtifactError(f"it trained on {answer.rows} rows, and said {self._rows[sender]}")
        if isinstance(answer, Told):
            self._told[sender] = _numbers(answer, {"agreement"})["agreement"]
        self._tally.masked(label, sender, words.numpy())

    def advance(self) -> bool:
        """End the step; whether another one follows.

        Raises:
            SumsError: too few clients are left, or what they revealed does not fit.
        """
        step, label = self.step
        left = tuple(name for name in self.asked if name in self._answered)
        if len(left) < self.needed:
            if label != POSITIVE:
                raise SumsError(f"{len(left)} clients are left in the step {step}, a sum needs {self.needed}.")
            self._steps.clear()
            return False
        if step == "reveal":
            self._opened[label] = self._tally.opened(label, self._terms[label])
        elif step == "share":
            self._weigh(left)
        self.asked, self._answered = left, set()
        del self._steps[0]
        if (step, label) in (("reveal", VALUES), ("mask", POSITIVE)) and left != self.clients:
            self._steps.clear()
        return bool(self._steps)

    def _weigh(self, clients: tuple[str, ...]) -> None:
        """Find by what the clients weigh themselves, by rows, or of H-TIES by their agreement in the round before."""
        known = [self._before[name] for name in clients if name in self._before]
        usual = sum(known) / len(known) if known else 0.0
        own = {name: self._before.get(name, usual) for name in clients}
        top = float(max(self._rows[name] for name in clients)) if self._form.by_rows else max(map(abs, own.values()))
        self._plain = replace(self._plain, top=top, usual=usual)
        count = len(clients)
        self._weights = {name: self._form.weight(self._rows[name], own[name], count, top) for name in clients}

    def _values(self, words: np.ndarray) -> torch.Tensor:
        bits = value_bits(len(self._rows))
        return torch.from_numpy(restored(words, self._form.reach(self.needed), bits))

    def summed(self) -> Summed:
        """What the sums make, once all are opened."""
        clients, opened = self.clients, self._opened[VALUES]
        total = self._values(opened[-self._size :])
        chosen = [self._weights[name] for name in clients]
        share = [weight / sum(chosen) for weight in chosen]
        analysis: dict[str, Any] = {
            "names": list(clients),
            "clients": len(clients),
            "parameters": self._size,
            "similarity": [],
            "heterogeneity": [],
            "weights": share,
            "conflict_mean": None,
            "conflict_histogram": [],
            "retention": [],
        }
        levels = dict[str, torch.Tensor]()
        update = total / sum(chosen)
        if self._form.signs:
            counted = signs_of(opened[: self._size], len(self._rows))
            flat = conflict_levels(counted, len(clients))
            levels = unflattened(flat, self._layout)
            analysis["conflict_mean"] = float(flat.double().mean()) / len(clients)
            analysis["conflict_histogram"] = torch.bincount(flat, minlength=len(clients) + 1).tolist()
        if self._form.elects:
            positive = self._values(self._opened[POSITIVE]) if POSITIVE in self._opened else None
            update = merged(total, positive, counted, sum(chosen) / len(chosen), self._form.rho)
            if positive is not None:
                told = [self._told[name] for name in clients]
                contested = float(counted.contested.double().mean())
                analysis |= {"agreement": told, "heterogeneity": heterogeneity(told), "contested": contested}
        analysis["zero_fraction"] = float((update == 0).double().mean())
        return Summed(unflattened(update.float(), self._layout), levels, analysis)


def signs_of(words: np.ndarray, members: int) -> Signs:
    """The counts in the first sum, of so many clients at most."""
    return Signs(*(torch.from_numpy(column.astype(np.int64)) for column in unpacked_counts(words, 2, members)))


def flattened(tensors: Tensors) -> torch.Tensor:
    """All values one after the other, in sorted order of the names, float32 [P]."""
    return torch.cat([tensors[name].detach().float().reshape(-1) for name in sorted(tensors)])


def unflattened(flat: torch.Tensor, layout: Tensors) -> dict[str, torch.Tensor]:
    """The reverse of `flattened`; values keep their dtype."""
    names = sorted(layout)
    parts = torch.split(flat, [layout[name].numel() for name in names])
    return {name: part.reshape(layout[name].shape) for name, part in zip(names, parts, strict=True)}


def _numbers(answer: Reply | Told, least: set[str], most: set[str] | None = None) -> Mapping[str, float]:
    """The numbers that a client tells, `least` of them and no others than `most`."""
    if not isinstance(answer, Told) or not least <= set(answer.numbers) <= (most or least):
        raise ArtifactError(f"it does not say its {', '.join(sorted(least))}")
    if not abs(answer.numbers.get("agreement", 0.0)) <= 1:
        raise ArtifactError(f"its agreement with the others is {answer.numbers['agreement']:g}")
    return answer.numbers


def _letter(answer: Reply | Told, sender: str) -> bytes:
    if not isinstance(answer, Told) or set(answer.letters) != {sender}:
        raise ArtifactError("it sent not one letter of its own")
    return answer.letters[sender]
