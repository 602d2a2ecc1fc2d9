"""The contract of a regulariser: what keeps a client near the others while it trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedproxy.tensors import Tensors

Penalty = Callable[[Tensors, Tensors, Tensors | None, float], torch.Tensor]
"""The trained parameters φ (gradients flow to them), the round's first values φ_t, the conflict C (none at first) and
the strength → what is added to the loss, a float32 scalar."""


class Trained(Protocol):
    """What a client's round was, as a regulariser sees it: `federation.messages.Reply` is one."""

    @property
    def update(self) -> Tensors:
        """τ_k, as the server reads it."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""

    @property
    def numbers(self) -> Mapping[str, float]:
        """What `Carried.numbers` asked for; the server checks the names before, and that the values are finite."""


@dataclass(frozen=True)
class Carried:
    """What server and clients carry from round to round: state of the layout of what is trained, in float32.

    A state is none before the first round. A client's changes in the rounds that count its update, and in no other.

    Attributes:
        name: What a client's state is called, for messages.
        numbers: Names of numbers of `models.training.Training` that a reply brings along.
        drift: The server's state, sent in the order, and the client's own → what each step of learning rate η takes
            away from the parameters, η times, beside the optimizer's change; empty for nothing. ArtifactError.
        client: The client's own state, the server's and its round → its state after the round. ArtifactError.
        server: The server's state, the rounds of the clients that count, at least one, and the number of clients of the
            federation → its state after the round. ArtifactError.
        check: A client's round, when it comes. ArtifactError if nothing can be made of its numbers.
        odd: A round's clients by name, and the ratio to their median that is still taken (above 1) → those to be left
            out, each with the reason.
    """

    name: str
    numbers: tuple[str, ...]
    drift: Callable[[Tensors | None, Tensors | None], dict[str, torch.Tensor]]
    client: Callable[[Tensors | None, Tensors | None, Trained], dict[str, torch.Tensor]]
    server: Callable[[Tensors | None, Sequence[Trained], int], dict[str, torch.Tensor]]
    check: Callable[[Trained], None]
    odd: Callable[[Mapping[str, Trained], float], dict[str, str]]


@dataclass(frozen=True)
class Regulariser:
    """A regulariser: a term added to the loss, or what is carried from round to round to correct the steps, or both.

    Attributes:
        name: Its name in configurations.
        strength: Strength of the term, unless the experiment gives one; none without a term.
        penalty: The term; none if it adds none.
        conflict: Whether the term needs the conflict of the round before, which orders then hold. Without conflict, as
            in the first round, it is zero.
        carried: What is carried; none if nothing is.
    """

    name: str
    strength: float | None = None
    penalty: Penalty | None = None
    conflict: bool = False
    carried: Carried | None = None

    @property
    def lasting(self) -> bool:
        """Whether it carries on what a space trains, which must keep its meaning then (`Space.lasting`)."""
        return self.carried is not None

    @property
    def tells(self) -> bool:
        """Whether orders tell clients of the others' updates, beyond the adapter."""
        return self.conflict or self.carried is not None

    def term(
        self, anchor: Tensors, conflict: Tensors | None, strength: float | None, device: torch.device
    ) -> Callable[[Tensors], torch.Tensor] | None:
        """The term of a round as a function of the trained parameters; none if it would be zero throughout.

        Args:
            anchor: φ_t.
            conflict: C of the round before, if there is one.
            strength: The experiment's strength; its own if none.
            device: Where the parameters are.
        """
        chosen = self.strength if strength is None else strength
        term = self.penalty
        if term is None or not chosen or (self.conflict and conflict is None):
            return None
        held, disputed = ({key: t.to(device) for key, t in (some or {}).items()} for some in (anchor, conflict))
        return lambda parameters: term(parameters, held, disputed or None, chosen)
