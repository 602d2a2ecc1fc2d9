import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.aggregation.regularise.scaffold import client_variate, drift, server_variate
from fedproxy.errors import ArtifactError, UsageError

CURVATURES = [torch.tensor([1.0, 4.0, 2.0]).double(), torch.tensor([3.0, 1.0, 2.0]).double()]
OPTIMA = [torch.tensor([2.0, -1.0, 0.0]).double(), torch.tensor([-2.0, 3.0, 1.0]).double()]
"""Two clients' losses Σ a/2 (y - o)²; of unequal curvature, so that the mean of the optima is not the joint optimum."""
OPTIMUM = sum(a * o for a, o in zip(CURVATURES, OPTIMA, strict=True)) / sum(CURVATURES)
SHAPES = {"a": (2, 3), "b": (4,)}


def one(value):
    return {"w": torch.tensor([float(value)])}


def gradient(client, y):
    return CURVATURES[client] * (y - OPTIMA[client])


def published(rounds, steps, rate):
    """Algorithm 1 of the paper, option II, all clients sampled and a global step of one, in its own symbols."""
    clients = range(len(OPTIMA))
    x, c = torch.zeros(3).double(), torch.zeros(3).double()
    own = [torch.zeros(3).double() for _ in clients]
    seen = []
    for _ in range(rounds):
        moved, changed = [], []
        for i in clients:
            y = x.clone()
            for _ in range(steps):
                y = y - rate * (gradient(i, y) - own[i] + c)
            plus = own[i] - c + (x - y) / (steps * rate)
            moved.append(y - x)
            changed.append(plus - own[i])
            own[i] = plus
        x = x + sum(moved) / len(moved)
        c = c + sum(changed) / len(changed)
        seen.append(x)
    return seen, c, own


def local_round(client, x, correction, rates, optimizer):
    """A client's steps with a torch optimizer, each corrected; all in float32 parameters, as in training."""
    y = torch.nn.Parameter(x["w"].clone())
    stepper = optimizer([y])
    for rate in rates:
        stepper.param_groups[0]["lr"] = rate
        stepper.zero_grad()
        (CURVATURES[client].float() / 2 * (y - OPTIMA[client].float()).square()).sum().backward()
        stepper.step()
        with torch.no_grad():
            if correction:
                y -= rate * correction["w"]
    return {"w": y.detach() - x["w"]}


def federated(rounds, rates, optimizer=torch.optim.SGD, corrected=True):
    """Ours: the mean of the updates, and the variates by the functions under test."""
    x, server, own = {"w": torch.zeros(3)}, None, [None] * len(OPTIMA)
    seen = []
    for _ in range(rounds):
        updates = [
            local_round(k, x, drift(server, own[k]) if corrected else {}, rates, optimizer) for k in range(len(OPTIMA))
        ]
        if corrected:
            own = [client_variate(own[k], server, update, sum(rates)) for k, update in enumerate(updates)]
            server = server_variate(server, updates, [sum(rates)] * len(updates), len(updates))
        x = {"w": x["w"] + sum(update["w"] for update in updates) / len(updates)}
        seen.append(x["w"].double())
    return seen, server, own


def test_scaffold_by_hand():
    # c = 1, c_1 = 3, τ_1 = -8, R_1 = 2: c_1⁺ = 3 - 1 + 4 = 6. Of four clients one replied: c⁺ = 1 + (6 - 3) / 4.
    assert drift(one(1), one(3))["w"].item() == -2.0
    assert client_variate(one(3), one(1), one(-8), 2.0)["w"].item() == 6.0
    assert server_variate(one(1), [one(-8)], [2.0], 4)["w"].item() == 1.75


def test_variates_are_zero_before_the_first_round():
    assert drift(None, None) == {}
    assert drift(one(5), None)["w"].item() == 5.0
    assert drift(None, one(5))["w"].item() == -5.0
    assert client_variate(None, None, one(-8), 2.0)["w"].item() == 4.0
    assert client_variate(None, one(1), one(-8), 2.0)["w"].item() == 3.0
    assert server_variate(None, [one(-8), one(4)], [2.0, 1.0], 4)["w"].item() == 0.0


def test_with_sgd_it_is_the_published_algorithm():
    found, server, own = federated(12, [0.05] * 10)
    expected, c, variates = published(12, 10, 0.05)
    for x, wanted in zip(found, expected, strict=True):
        assert torch.allclose(x, wanted, atol=1e-5)
    assert torch.allclose(server["w"].double(), c, atol=1e-5)
    for variate, wanted in zip(own, variates, strict=True):
        assert torch.allclose(variate["w"].double(), wanted, atol=1e-5)


def test_many_local_steps_reach_the_joint_optimum_and_without_variates_another_point():
    rates = [0.1] * 20
    corrected, _, _ = federated(60, rates)
    plain, _, _ = federated(60, rates, corrected=False)
    assert torch.allclose(corrected[-1], OPTIMUM, atol=1e-3)
    assert (plain[-1] - plain[-2]).norm() < 1e-5
    assert (plain[-1] - OPTIMUM).norm() > 0.3


def test_at_the_joint_optimum_each_variate_is_the_clients_gradient():
    _, server, own = federated(60, [0.1] * 20)
    assert torch.allclose(server["w"].double(), torch.zeros(3).double(), atol=1e-3)
    for client, variate in enumerate(own):
        assert torch.allclose(variate["w"].double(), gradient(client, OPTIMUM), atol=1e-3)


def test_with_adam_it_rests_where_the_directions_cancel_which_is_not_the_joint_optimum():
    found, server, own = federated(60, [0.1] * 20, lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.0))
    assert (found[-1] - found[-2]).norm() < 1e-4
    assert torch.allclose(server["w"], torch.zeros(3), atol=1e-4)
    assert torch.allclose(own[0]["w"], -own[1]["w"], atol=1e-4)
    assert (found[-1] - OPTIMUM).norm() > 0.3


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("rates", [[0.1] * 5, [0.01, 0.02, 0.03, 0.02, 0.01]], ids=["constant", "schedule"])
def test_a_variate_is_the_mean_direction_of_the_clients_own_optimizer(optimizer, rates):
    x, correction = {"w": torch.zeros(3)}, {"w": torch.tensor([0.5, -0.25, 1.0])}
    y = torch.nn.Parameter(x["w"].clone())
    stepper, total = optimizer([y]), torch.zeros(3)
    for rate in rates:
        stepper.param_groups[0]["lr"] = rate
        stepper.zero_grad()
        (CURVATURES[0].float() / 2 * (y - OPTIMA[0].float()).square()).sum().backward()
        before = y.detach().clone()
        stepper.step()
        with torch.no_grad():
            total += before - y
            y -= rate * correction["w"]
    server, own = {"w": torch.ones(3)}, {"w": 1.0 - correction["w"]}
    update = local_round(0, x, drift(server, own), rates, optimizer)
    assert torch.allclose(client_variate(own, server, update, sum(rates))["w"], total / sum(rates), atol=1e-5)


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@given(presence=st.lists(st.lists(st.booleans(), min_size=4, max_size=4).filter(any), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_the_servers_variate_is_the_mean_of_all_clients_whoever_replied(presence):
    server, own = None, [None] * 4
    for number, there in enumerate(presence):
        replied = [k for k in range(4) if there[k]]
        updates = {k: drawn(10 * number + k) for k in replied}
        rates = {k: 0.5 + 0.1 * k for k in replied}
        after = server_variate(server, list(updates.values()), list(rates.values()), 4)
        for k in replied:
            own[k] = client_variate(own[k], server, updates[k], rates[k])
        server = after
    for name in SHAPES:
        mean = sum(variate[name].double() for variate in own if variate) / 4
        assert torch.allclose(server[name].double(), mean, atol=1e-5)


def test_the_order_of_the_clients_does_not_matter():
    updates, rates = [drawn(k) for k in range(4)], [0.1, 0.2, 0.3, 0.4]
    first = server_variate(drawn(9), updates, rates, 5)
    second = server_variate(drawn(9), updates[::-1], rates[::-1], 5)
    assert all(torch.allclose(first[name], second[name], rtol=1e-6, atol=1e-7) for name in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variates_are_float32_and_what_is_given_stays(dtype):
    update = {name: tensor.to(dtype) for name, tensor in drawn(1).items()}
    given = [drawn(2), drawn(3), update]
    copies = [{name: tensor.clone() for name, tensor in some.items()} for some in given]
    own, server, _ = given
    for found in (
        drift(server, own),
        client_variate(own, server, update, 0.5),
        server_variate(server, [update, update], [0.5, 1.0], 3),
    ):
        assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == {
            name: (shape, torch.float32) for name, shape in SHAPES.items()
        }
    for some, copy in zip(given, copies, strict=True):
        assert all(torch.equal(some[name], copy[name]) for name in copy)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_round_without_steps_is_explained(bad):
    with pytest.raises(ArtifactError, match="sum of a round's learning rates is"):
        client_variate(None, None, one(1), bad)
    with pytest.raises(ArtifactError, match="sum of a round's learning rates is"):
        server_variate(None, [one(1), one(1)], [1.0, bad], 2)


def test_variates_of_another_adapter_are_refused():
    other = {"w": torch.zeros(2)}
    with pytest.raises(ArtifactError, match=r"the client's control variate: w has shape \[2\]"):
        drift(one(1), other)
    with pytest.raises(ArtifactError, match=r"the client's control variate: w has shape \[2\]"):
        client_variate(other, one(1), one(1), 1.0)
    with pytest.raises(ArtifactError, match=r"the server's control variate: w has shape \[2\]"):
        client_variate(one(1), other, one(1), 1.0)
    with pytest.raises(ArtifactError, match=r"the server's control variate: w has shape \[2\]"):
        server_variate(other, [one(1)], [1.0], 1)
    with pytest.raises(ArtifactError, match=r"an update: w has shape \[2\]"):
        server_variate(None, [one(1), other], [1.0, 1.0], 2)


@pytest.mark.parametrize(("updates", "rates", "clients"), [(0, 0, 2), (2, 1, 2), (2, 2, 1)])
def test_counts_that_do_not_fit_are_explained(updates, rates, clients):
    with pytest.raises(UsageError, match=f"{updates} updates, {rates} sums of learning rates and {clients} clients"):
        server_variate(None, [one(1)] * updates, [1.0] * rates, clients)
