"""A data owner's own budget, before and while it takes part in a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedproxy.federation.offer import Limits, Offer
from fedproxy.federation.session import PRIVATE
from fedproxy.models.training import optimizer_steps
from fedproxy.privacy.budget import Budget
from fedproxy.privacy.plan import Plan
from fedproxy.privacy.releases import Releases

FOLDER = "budget"
"""Below the cache: it is of this machine's rows, whichever server asks for them."""


def open_purse(
    offer: Offer, limits: Limits, rows: Sequence[Mapping[str, Any]], cache: Path, state: Path | None
) -> Budget | None:
    """The budget that `max_epsilon` sets for some rows; none if it is not set.

    Args:
        offer: What is offered; it is private, as `check_offer` has seen to.
        limits: What the client allows.
        rows: The rows that are trained on.
        cache: The client's cache.
        state: What it remembers of this run, if all that is left of the run must be within the budget; none if not.

    Raises:
        OverspentError: it is not.
        UsageError: as of `Plan.of`; or the budget cannot be written.
        ArtifactError: what is noted is damaged.
    """
    privacy, train = offer.train.privacy, offer.train
    if limits.max_epsilon is None or privacy is None:
        return None
    purse = Budget(cache / FOLDER, rows, limits.max_epsilon)
    if state is not None:
        steps = optimizer_steps(len(rows), train)
        plan = Plan.of(privacy, train, rows=len(rows), steps=steps, rounds=offer.federate.rounds)
        purse.check(plan.cost(max(0, plan.rounds - Releases(state / PRIVATE, plan).count)))
    return purse
