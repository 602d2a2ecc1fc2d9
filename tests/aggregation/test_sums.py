"""Merge rules from sums alone, each function by hand, and against the rules that see the single updates."""

import math

import pytest
import torch

from fedproxy.aggregation import analyse
from fedproxy.aggregation.merge.h_ties import HTiesOptions, h_ties
from fedproxy.aggregation.sums import Signs, agreement, conflict_levels, heterogeneity, merged, signs, weight


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def counted(updates: list[torch.Tensor]) -> Signs:
    """The counts of the first sum, as the clients' columns make them."""
    return Signs(*(torch.stack(column).sum(dim=0) for column in zip(*map(signs, updates), strict=True)))


def election(*pairs: tuple[int, int]) -> Signs:
    return Signs(*(torch.tensor(side) for side in zip(*pairs, strict=True)))


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_client_counts_for_the_signs_of_its_update():
    up, down = signs(vector(3.0, -1.0, 0.0))
    assert (up.tolist(), down.tolist()) == ([True, False, False], [False, True, False])


def test_contested_is_where_both_sides_have_three():
    assert election((3, 3), (4, 3), (2, 6), (6, 2), (9, 0), (0, 0)).contested.tolist() == [True, True] + [False] * 4


def test_agreement_by_hand():
    """τ = (3, -4), norm 5; the others' signs are (+, +) and (+, -): cosines (3 - 4) / (5 √2) and (3 + 4) / (5 √2)."""
    updates = [vector(3.0, -4.0), vector(1.0, 2.0), vector(5.0, -1.0)]
    found = agreement(updates[0], counted(updates), 3)
    assert found == pytest.approx((-1 + 7) / 2 / (5 * math.sqrt(2)), abs=1e-15)


@pytest.mark.parametrize("clients", [2, 3, 7])
@pytest.mark.parametrize("parameters", [1, 10, 1000])
def test_agreement_is_the_mean_cosine_with_the_others_sign_vectors(clients, parameters):
    generator = torch.Generator().manual_seed(clients * parameters)
    updates = [torch.randn(parameters, generator=generator) for _ in range(clients)]
    sums = counted(updates)
    for k, update in enumerate(updates):
        others = [other.sign().double() for j, other in enumerate(updates) if j != k]
        cosines = [torch.nn.functional.cosine_similarity(update.double(), other, dim=0) for other in others]
        assert agreement(update, sums, clients) == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-12)


def test_who_is_alone_or_moves_nothing_agrees_with_nobody():
    one, zero = vector(1.0, 2.0), vector(0.0, 0.0)
    assert agreement(one, counted([one]), 1) == 0.0
    assert agreement(zero, counted([one, zero]), 2) == 0.0


def test_heterogeneity_by_hand():
    assert heterogeneity([0.5, -0.25, 0.0]) == [0.5, 1.0, 1.0]


def test_the_weights_that_clients_find_alone_are_those_of_the_softmax_over_all():
    told = [0.5, -0.25, 0.0]
    masses = [math.exp(1.0), math.exp(0.5), 1.0]  # (K - 1) |s|
    assert [weight(own, 0.5, 3) for own in told] == pytest.approx([mass / max(masses) for mass in masses])
    assert weight(0.7, 0.5, 3) == 1.0  # a false top makes nobody heavier


def test_without_a_second_sum_the_sign_of_the_sum_is_elected_by_hand():
    """Sums over the number of clients of the sum's sign, and the mean weight 0.5; a sum of zero moves nothing."""
    sums = election((2, 1), (1, 3), (4, 3), (3, 0), (1, 1))
    found = merged(double(1.5, -6.0, 2.0, 9.0, 0.0), None, sums, 0.5, 1.1)
    assert found.tolist() == [1.5 / 2 / 0.5, -6.0 / 3 / 0.5, 2.0 / 4 / 0.5, 9.0 / 3 / 0.5, 0.0]


@pytest.mark.parametrize(
    ("total", "positive", "sides", "found"),
    [
        (2.0, 5.0, (4, 3), 5.0 / 4),  # p = 5, n = 3
        (-2.0, 3.0, (4, 5), -5.0 / 5),  # p = 3, n = 5
        (-0.2, 3.0, (4, 5), 0.0),  # 3 against 3.2: neither is 1.1 times the other
        (1.0, 11.0, (3, 3), 11.0 / 3),  # p = ρ·n, 11 against 10
        (2.0, 0.0, (4, 2), 2.0 / 4),  # not contested: the second sum has nothing of it
        (-2.0, 0.0, (5, 1), -2.0 / 1),
    ],
)
def test_where_both_sides_have_three_the_larger_mass_is_elected_by_hand(total, positive, sides, found):
    given = merged(double(total), double(positive), election(sides), 2.0, 1.1)
    assert given.tolist() == pytest.approx([found / 2.0])


def test_where_everything_is_contested_it_is_h_ties():
    """Equal weights, nothing trimmed, three clients of each sign everywhere: Eq. 13 and 14 as they are published."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.rand(2, 3, 400, generator=generator) + 0.01
    updates = [*halves[0], *-halves[1]]
    positive = halves[0].double().sum(dim=0)
    total = positive - halves[1].double().sum(dim=0)
    found = merged(total, positive, counted(updates), 1.0, 1.1)
    plain = h_ties(torch.stack(updates).double(), torch.full((6,), 1 / 6, dtype=torch.float64), HTiesOptions())
    assert 0.0 < float((found == 0).double().mean()) < 1.0
    assert found.tolist() == pytest.approx(plain.tolist(), abs=1e-12)


def test_conflict_levels_by_hand():
    assert conflict_levels(election((3, 0), (2, 1), (0, 3), (1, 1), (0, 0)), 3).tolist() == [0, 2, 0, 3, 3]


@pytest.mark.parametrize("clients", [2, 3, 8])
def test_conflict_levels_are_those_of_the_updates(clients):
    generator = torch.Generator().manual_seed(clients)
    updates = [torch.randn(500, generator=generator).round() for _ in range(clients)]  # with zeros
    given = [{"w": update} for update in updates]
    levels = analyse.empty_levels(given)
    histogram = analyse.measure(given, levels=levels).histogram
    found = conflict_levels(counted(updates), clients)
    assert torch.equal(found, levels["w"].long())
    assert torch.bincount(found, minlength=clients + 1).tolist() == histogram
