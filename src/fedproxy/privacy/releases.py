"""The private trainings whose outcome a client gave away in a run: none is done twice, none goes beyond the announced.

A round may be ordered again, since an answer was lost or the server went on after a kill. The client then gives the
same outcome again, which tells nothing new. So the outcome is on the disk before it leaves, and with it the number of
all there were: a kill at any moment leaves neither an answer that is not accounted for nor a second one to the same
order.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedproxy.artifacts import os_error
from fedproxy.errors import ArtifactError, FederationError
from fedproxy.privacy.accounting import Steps
from fedproxy.privacy.plan import Plan
from fedproxy.tensor_files import load_tensors, read_header, save_tensors
from fedproxy.tensors import Tensors, digest

_FILE = "released.safetensors"


class OverspentError(FederationError):
    """A client's own budget, or the announced one, forbids a training."""


class Purse(Protocol):
    """Whoever pays for a training."""

    def check(self, cost: Steps) -> None:
        """Raise `OverspentError` if the cost is not to be had."""
        ...

    def spend(self, cost: Steps) -> None:
        """Note a cost for good, before anything leaves; raises as `check` does."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a private training gives away.

    Attributes:
        adapter: The trained adapter.
        numbers: What else of the training is told; none of it follows from the rows.
    """

    adapter: Tensors
    numbers: Mapping[str, float]


class Releases:
    """The outcomes of one client in one run.

    Args:
        folder: Where the last one is kept.
        plan: What each training does and costs, and how many were announced.
        purse: Who pays beside the run's own budget, if anybody.
    """

    def __init__(self, folder: Path, plan: Plan, purse: Purse | None = None) -> None:
        self._path, self.plan, self._purse = folder / _FILE, plan, purse

    @property
    def count(self) -> int:
        """How many there were.

        Raises:
            ArtifactError: what is kept is damaged.
        """
        return int(self._known()["count"])

    @property
    def spent(self) -> float:
        """The ε that they cost; raises as `count` does."""
        return self.plan.spent(self.count)

    def _known(self) -> dict[str, Any]:
        if not self._path.exists():
            return {"count": 0, "order": "", "numbers": {}}
        try:
            known: dict[str, Any] = json.loads(read_header(self._path).metadata["released"])
            return {"count": int(known["count"]), "order": str(known["order"]), "numbers": dict(known["numbers"])}
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{self._path}: it does not say how often this client trained.") from error

    def outcome(self, number: int, adapter: Tensors, train: Callable[[], Outcome]) -> Outcome:
        """Train, unless this very order was answered before.

        Args:
            number: The round.
            adapter: What the order has the client train from.
            train: Does it.

        Returns:
            What came of it, now or when the order was answered first.

        Raises:
            OverspentError: the trainings that were announced were given away, or the purse is empty; nothing was
                trained, or what was trained goes nowhere.
            ArtifactError: what is kept is damaged.
            ResourceError, UsageError: it cannot be written.
        """
        order, known = f"{number} {digest(adapter)}", self._known()
        if known["order"] == order:
            return Outcome(load_tensors(self._path), known["numbers"])
        if known["count"] >= self.plan.rounds:
            raise OverspentError(
                f"round {number} asks for another training, and all {self.plan.rounds} that were announced were done: "
                "the budget of [train.privacy] epsilon is spent."
            )
        cost = self.plan.cost(1)
        if self._purse is not None:
            self._purse.check(cost)
        done = train()
        if self._purse is not None:
            self._purse.spend(cost)
        kept = {"count": known["count"] + 1, "order": order, "numbers": dict(done.numbers)}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(self._path, done.adapter, metadata={"released": json.dumps(kept)})
        except OSError as error:
            raise os_error(error, self._path) from error
        return done
