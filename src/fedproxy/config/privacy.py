"""[train.privacy] and [federate.privacy], and what does not go together with the former."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from fedproxy.config.checked import Rule, table

if TYPE_CHECKING:
    from fedproxy.config.tables import Federate, Train


@table
class Privacy:
    """[train.privacy]: each client trains with differential privacy for its rows (docs/privacy_budget.md).

    Attributes:
        epsilon: What all rounds together may tell of any one row, at most: the budget, from which the noise follows.
        delta: Probability that the budget does not bind; n^-1.1 of a client's n rows if none.
        clip: Largest Euclidean norm that a row's gradient counts with, over all trained parameters. The noise is in
            proportion to it.
    """

    epsilon: Annotated[float, Rule("at least 0.01 and at most 100", lambda v: 0.01 <= v <= 100)]
    delta: Annotated[float, Rule("above 0 and below 0.1", lambda v: 0 < v < 0.1)] | None = None
    clip: Annotated[float, Rule("greater than 0", lambda v: v > 0)] = 1.0


@table
class ClientPrivacy:
    """[federate.privacy]: what is learned tells little of any one client, for many clients (docs/privacy_budget.md).

    Attributes:
        epsilon: What all rounds together may tell of any one client, at most: the budget, from which the noise follows.
        delta: Probability that the budget does not bind, well below one in the number of clients.
        clip: Largest Euclidean norm that an update counts with. The noise is in proportion to it.
    """

    epsilon: Annotated[float, Rule("at least 0.01 and at most 100", lambda v: 0.01 <= v <= 100)]
    delta: Annotated[float, Rule("above 0 and below 0.1", lambda v: 0 < v < 0.1)]
    clip: Annotated[float, Rule("greater than 0", lambda v: v > 0)]


def unprivate(train: "Train", federate: "Federate") -> Iterator[str]:
    """What of [train] and [federate] would tell of rows what [train.privacy] does not account for, in sentences."""
    if train.privacy is None:
        return
    if train.padding_free:
        yield (
            "[train.privacy] clips the gradient of each row, and padding_free lays several rows into one: set [train] "
            "padding_free = false."
        )
    if train.report_to:
        yield "[train.privacy] covers no training losses, which [train] report_to gives away: leave it out."
    if federate.validation:
        yield (
            "[train.privacy] covers no scores, which [federate] validation has the clients send: set validation = 0, "
            "and evaluate on rows that are nobody's secret."
        )
