"""What the coordinator and the clients say to each other, and what a round ends in; bytes are `protocol`'s matter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fedproxy.federation.parcel import Parcel
from fedproxy.federation.wire import PLAIN, packed_bytes
from fedproxy.tensors import Tensors


@dataclass(frozen=True)
class Score:
    """What a model reached on a client's validation rows.

    Attributes:
        loss: Mean over the tokens of the completions, nats.
        rows: Number of the rows.
        accuracy: Share of the rows answered right; none where the answers are no labels.
    """

    loss: float
    rows: int
    accuracy: float | None = None


Step = Literal["advertise", "share", "mask", "agree", "reveal"]
"""The steps of secure sums, see `privacy.sums.protocol`."""


@dataclass(frozen=True)
class Ask:
    """What an order asks for the round's secure sums.

    Attributes:
        step: The step.
        attempt: How often the round was begun before.
        label: The sum, from the step "mask" on.
        threshold: Clients of which a sum must be, at least; 0 before the step "share".
        top: The most rows of a client, or the largest agreement with the others, by which it weighs its values
            (`secure.form.Form.weight`).
        usual: The agreement of a client that has none from a round before.
        letters: By client: its advert, or what it sealed for this one; of those whose masked words came, nothing, or,
            to "reveal", what they signed.
        counts: The counts of signs, uint32 [P], with which the second sum is asked for.
    """

    step: Step
    attempt: int = 0
    label: str = ""
    threshold: int = 0
    top: float = 0.0
    usual: float = 0.0
    letters: Mapping[str, bytes] = field(default_factory=dict)
    counts: torch.Tensor | None = None


@dataclass(frozen=True)
class Order:
    """What a client gets for a round: an adapter to train from, or, once the round is merged, one to score.

    Attributes:
        round: Counted from 1.
        adapter: The global adapter φ_t as far as it is trained: what the client trains from, to the bit.
        conflict: The conflict of the round before, float32; none at first.
        voters: Number K of the updates that the conflict compares: its values are multiples of 1/K; 0 without one.
        state: The server's state of a regulariser that carries one; none in its first round.
        share: Share of its coordinates that the client sends in an encoding that goes by it.
        parcel: What travels in place of `adapter`, where it is encoded: its difference from the adapter that the run
            began with.
        since: The last round before whose update of this client counted, 0 for none: what the client remembers goes on
            from there. 0, too, where there is nothing to remember.
        trains: Whether the client trains; else it scores the adapter, the one that the round ended with.
        untuned: Whether a client that trains also scores the untuned proxy.
        ask: What the order asks for the round's secure sums. Unless the client trains it asks for nothing else, and has
            no adapter.
    """

    round: int
    adapter: Tensors
    conflict: Tensors | None = None
    voters: int = 0
    state: Tensors | None = None
    share: float = 1.0
    parcel: Parcel | None = None
    since: int = 0
    trains: bool = True
    untuned: bool = False
    ask: Ask | None = None

    @property
    def what(self) -> str:
        """What tells it from the other orders of its round, but those that ask for the same again."""
        ask = self.ask
        return self.kind if ask is None else f"{self.kind} {ask.attempt} {ask.step} {ask.label}"

    @property
    def kind(self) -> Literal["train", "score", "sum"]:
        """What the order asks for."""
        return "train" if self.trains else "score" if self.ask is None else "sum"


@dataclass(frozen=True)
class Reply:
    """What a client returns: its update τ_k = φ_k − φ_t, and what the training was.

    Attributes:
        client: Its name.
        round: The round it answers.
        update: τ_k by tensor name, the layout of the order's adapter; it may lie on disk (`MappedTensors`). With secure
            sums the masked words in its place (`WORDS`).
        rows: Training rows.
        tokens: Tokens trained on; 0 under [train.privacy], which does not cover them.
        steps: Optimizer steps.
        loss: Mean training loss, nats per token; none under [train.privacy].
        seconds: Time the training took.
        numbers: What else of the training its regulariser needs (`Carried.numbers`), by name.
        peak_memory: Bytes of memory at the training's peak; 0 under [train.privacy].
        wire: The encoding that it travels in.
        size: Bytes of the update as it travels.
        parcel: What travels in place of `update`, where it is encoded and did not travel yet.
        epsilon: What this and all earlier updates of the run cost of the budget of [train.privacy]; none without.
        validation: What the "untuned" proxy, the proxy with the client's "own" update, and the one that was trained
            "alone" reached on its validation rows; empty if it gives no scores.
    """

    client: str
    round: int
    update: Tensors
    rows: int
    tokens: int
    steps: int
    loss: float | None
    seconds: float
    numbers: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    wire: str = PLAIN
    size: int = field(default=0, compare=False)
    parcel: Parcel | None = field(default=None, compare=False)
    epsilon: float | None = None
    validation: Mapping[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """What a client returns when it was to score: what the round's adapter reached on its validation rows."""

    client: str
    round: int
    score: Score


WORDS = "words"
"""Name of the tensor of masked words, uint32 [P], or [2P] where signs are counted before the values."""


@dataclass(frozen=True)
class Told:
    """What a client returns in a step of secure sums, but for the masked words of its training.

    Attributes:
        client: Its name.
        round: The round.
        step: The step.
        label: The sum, as it was asked for.
        letters: By client: what it sealed for each other, or under its own name what it advertises, signs or reveals.
        words: Masked words under `WORDS`, in the step "mask".
        numbers: With its advert its "rows" and, if it has one, its "agreement" with the others in the round before
            (`aggregation.sums`); with the second sum its "agreement" in this one.
    """

    client: str
    round: int
    step: Step
    label: str = ""
    letters: Mapping[str, bytes] = field(default_factory=dict)
    words: Tensors = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)


Kind = Literal["declined", "failed", "invalid", "late"]


@dataclass(frozen=True)
class Refusal:
    """An answer without an update.

    Attributes:
        client: Who gives it, or was to give a reply.
        round: The round it belongs to.
        reason: One sentence.
        kind: "declined": the client's own limits forbid it; "failed": its training or its process ended in an error;
            "invalid": what it sent cannot be read. Only the last is held against it.
    """

    client: str
    round: int
    reason: str
    kind: Literal["declined", "failed", "invalid"] = "failed"


Answer = Reply | Scored | Told | Refusal


@dataclass(frozen=True)
class Closed:
    """A complete round.

    Attributes:
        round: Its number t.
        adapter: φ_{t+1}.
        conflict: Eq. 7, by trained tensor; empty where the space of the merge has none.
        server_state: The server optimizer's state; empty without one.
        state: The server's state of a regulariser that carries one; else empty.
        record: What `round.json` holds; of a round that clients score, complete once they did.
    """

    round: int
    adapter: dict[str, torch.Tensor]
    conflict: dict[str, torch.Tensor]
    server_state: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    record: dict[str, Any]


def size_in_bytes(tensors: Tensors | None) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.element_size() for t in (tensors or {}).values())


def order_size(order: Order) -> int:
    """Bytes of the order's tensors as they travel: the adapter in its encoding, the conflict in bits, the state."""
    adapter = order.parcel.parts if order.parcel else order.adapter
    conflict = sum(packed_bytes(t.numel(), order.voters.bit_length()) for t in (order.conflict or {}).values())
    return size_in_bytes(adapter) + conflict + size_in_bytes(order.state) + (ask_size(order.ask) if order.ask else 0)


def ask_size(said: Ask | Told) -> int:
    """Bytes of the letters and words of a step of secure sums."""
    words = said.words.values() if isinstance(said, Told) else [said.counts] if said.counts is not None else []
    return sum(map(len, said.letters.values())) + sum(t.numel() * t.element_size() for t in words)
