"""SCAFFOLD: control variates say how each client's direction differs from all clients', and every step is corrected.

It adds nothing to the loss: after each step of the local optimizer, of learning rate η_i, the client moves once more,
against the drift: y ← y - η_i (c - c_k). Client and server keep a variate each, c_k and c, zero before the first round,
and need no message beyond c, the update τ_k = y - x and the sum R_k of the learning rates.

The paper's local optimizer is SGD of one learning rate, where a step is η g(y). Ours may be any: with d_i its own
direction, so that it alone would do y ← y - η_i d_i, a round gives -τ_k = Σ η_i d_i + R_k (c - c_k). So option II,
c_k⁺ = c_k - c - τ_k / R_k, is the mean of the d_i, weighed by η_i, and for SGD it is the published algorithm exactly.
With Adam the variates hold directions of Adam, not gradients, and the federation rests where these cancel over the
clients; that need not be where the gradients do.

Reference: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", 2020
(arXiv 1910.06378), Alg. 1, option II, and Eq. 4.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from fedproxy.aggregation.regularise.contract import Carried, Regulariser, Trained
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.tensors import Tensors, check_layout

MEDIAN_NEEDS = 3
"""Clients from which on mean learning rates are held against their median: of two, either may be the wrong one."""


def drift(server: Tensors | None, own: Tensors | None) -> dict[str, torch.Tensor]:
    """What a client adds to the direction of each of its steps: c - c_k.

    Args:
        server: c, float32; none before the first round.
        own: c_k, float32; none before the client's first round.

    Returns:
        Name → float32; empty if both are none, which means zero.

    Raises:
        ArtifactError: the variates have not the same layout.
    """
    if server is None:
        return {name: -value for name, value in (own or {}).items()}
    if own is None:
        return dict(server)
    check_layout(server, own, "the client's control variate")
    return {name: value - own[name] for name, value in server.items()}


def client_variate(
    own: Tensors | None, server: Tensors | None, update: Tensors, rate_sum: float
) -> dict[str, torch.Tensor]:
    """c_k⁺ = c_k - c - τ_k / R_k: the mean direction of the client's own optimizer over the round.

    Args:
        own: c_k, that the round's steps were corrected with; none before the client's first round.
        server: c, likewise; none before the first round.
        update: τ_k, the trained minus the given parameters.
        rate_sum: R_k, the sum of the learning rates of the round's steps.

    Returns:
        Name → float32.

    Raises:
        ArtifactError: R_k is not a finite number above zero, or a variate has not the update's layout in float32.
    """
    _check_rate_sum(rate_sum)
    wide = {name: value.float() for name, value in update.items()}
    for variate, whose in ((own, "the client's control variate"), (server, "the server's control variate")):
        if variate is not None:
            check_layout(wide, variate, whose)
    correction = drift(server, own)
    return {
        name: -value / rate_sum - correction[name] if correction else -value / rate_sum for name, value in wide.items()
    }


def server_variate(
    server: Tensors | None, updates: Sequence[Tensors], rate_sums: Sequence[float], clients: int
) -> dict[str, torch.Tensor]:
    """c⁺ = c + 1/N · Σ_k (c_k⁺ - c_k), where c_k⁺ - c_k = -c - τ_k / R_k needs no variate of a client.

    As long as each c_k changes in the rounds that count the client's update, and in no other, c is the mean of all c_k.

    Args:
        server: c; none before the first round.
        updates: τ_k of the clients whose updates count, at least one. Summed in this order, in float64.
        rate_sums: R_k, one a client.
        clients: N, the clients of the federation, whether they replied or not.

    Returns:
        Name → float32.

    Raises:
        ArtifactError: an R_k is not a finite number above zero, or an update or c has not the first update's layout.
        UsageError: there is no update, another number of sums than of updates, or fewer clients than updates.
    """
    if not updates or len(rate_sums) != len(updates) or clients < len(updates):
        raise UsageError(
            f"SCAFFOLD: {len(updates)} updates, {len(rate_sums)} sums of learning rates and {clients} clients; give "
            "one sum an update, at least one update, and no more updates than the federation has clients."
        )
    for update, rate_sum in zip(updates, rate_sums, strict=True):
        check_layout(updates[0], update, "an update")
        _check_rate_sum(rate_sum)
    if server is not None:
        expected = {name: value.float() for name, value in updates[0].items()}
        check_layout(expected, server, "the server's control variate")
    result = {}
    for name, first in updates[0].items():
        c = torch.zeros_like(first, dtype=torch.float64) if server is None else server[name].double()
        total = torch.zeros_like(c)
        for update, rate_sum in zip(updates, rate_sums, strict=True):
            total -= c + update[name].double() / rate_sum
        result[name] = (c + total / clients).float()
    return result


def _check_rate_sum(rate_sum: float) -> None:
    if not 0.0 < rate_sum < math.inf:
        raise ArtifactError(
            f"SCAFFOLD: the sum of a round's learning rates is {rate_sum:g}; it must be finite and above 0. A client "
            "that took no step has no direction: leave its update out."
        )


def odd_rates(rates: Mapping[str, float], ratio: float) -> dict[str, str]:
    """The clients whose mean learning rate is `ratio` times the round's median or more, or as far below it.

    An update is divided by the sum of its learning rates, so one that is far too small would move the variate of all.
    Schedules are the same for all clients, their lengths differ with the rows.

    Args:
        rates: Sum of the learning rates over the number of steps.
        ratio: Above 1.
    """
    if len(rates) < MEDIAN_NEEDS:
        return {}
    median = sorted(rates.values())[(len(rates) - 1) // 2]
    return {
        name: f"its mean learning rate {rate:.4g} is not near the round's median {median:.4g}"
        for name, rate in rates.items()
        if not median / ratio < rate < median * ratio
    }


def _rate_sum(client: Trained) -> float:
    return client.numbers["rate_sum"]


SCAFFOLD = Regulariser(
    "scaffold",
    carried=Carried(
        name="control variate",
        numbers=("rate_sum",),
        drift=drift,
        client=lambda own, server, done: client_variate(own, server, done.update, _rate_sum(done)),
        server=lambda server, done, clients: server_variate(
            server, [one.update for one in done], [_rate_sum(one) for one in done], clients
        ),
        check=lambda done: _check_rate_sum(_rate_sum(done)),
        odd=lambda done, ratio: odd_rates({name: _rate_sum(one) / one.steps for name, one in done.items()}, ratio),
    ),
)
