"""Merge rules from sums alone, each function by hand, and against the rules that see the single updates."""

import math

import pytest
import torch

from fedproxy.aggregation import analyse
from fedproxy.aggregation.sums import (
    Signs,
    agreeing,
    agreement,
    conflict_levels,
    elected,
    heterogeneity,
    kept,
    mean_of,
    signs,
    weight,
)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def counted(updates: list[torch.Tensor], cuts: list[torch.Tensor]) -> Signs:
    """The first sum, as the clients' columns make it."""
    columns = zip(*(signs(update, cut) for update, cut in zip(updates, cuts, strict=True)), strict=True)
    return Signs(*(torch.stack(column).sum(dim=0) for column in columns))


def election(*pairs: tuple[int, int]) -> Signs:
    up, down = (torch.tensor(side) for side in zip(*pairs, strict=True))
    return Signs(up, down, up, down)


def test_a_client_counts_for_the_signs_of_its_whole_and_of_its_trimmed_update():
    whole, cut = vector(3.0, -1.0, 0.5, 0.0), vector(3.0, 0.0, 0.0, 0.0)
    assert [column.tolist() for column in signs(whole, cut)] == [
        [True, False, True, False],
        [False, True, False, False],
        [True, False, False, False],
        [False, False, False, False],
    ]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (1.0, [0.5, -2.0, 2.0, -0.1, 1.0]),
        (0.6, [0.0, -2.0, 2.0, 0.0, 1.0]),
        (0.59, [0.0, -2.0, 2.0, 0.0, 0.0]),  # ⌊2.95⌋ entries
        (0.2, [0.0, -2.0, 0.0, 0.0, 0.0]),  # of equal magnitudes the lower index
        (0.0, [0.0] * 5),
    ],
)
def test_the_largest_entries_are_kept_eq_11(share, expected):
    update = vector(0.5, -2.0, 2.0, -0.1, 1.0)
    assert kept(update, share).tolist() == vector(*expected).tolist()
    assert update.tolist() == vector(0.5, -2.0, 2.0, -0.1, 1.0).tolist()


@pytest.mark.parametrize(
    ("p", "n", "rho", "least", "sign"),
    [
        (3, 1, 1.0, 3, 1),
        (1, 3, 1.0, 3, -1),
        (3, 3, 1.0, 3, 1),  # a tie with ρ = 1 is +, as in Eq. 13
        (3, 3, 1.1, 3, 0),
        (4, 3, 1.5, 3, 0),
        (3, 2, 1.5, 3, 1),  # p = ρ·n exactly
        (2, 3, 1.5, 3, -1),
        (2, 0, 1.0, 3, 0),  # elected, but too few
        (2, 1, 1.0, 3, 0),
        (2, 0, 1.0, 2, 1),
        (0, 2, 1.0, 2, -1),
        (2, 2, 1.0, 3, 0),  # + is elected and too few; - is not taken in its place
        (0, 0, 1.0, 1, 0),
    ],
)
def test_the_elected_sign_by_hand(p, n, rho, least, sign):
    found = elected(election((p, n)), rho, least)
    assert (found.tolist(), found.dtype) == ([sign], torch.int8)


def test_what_has_the_elected_sign_agrees():
    cut, chosen = vector(1.0, -2.0, 3.0, 0.0, -5.0), torch.tensor([1, 1, 0, 1, -1], dtype=torch.int8)
    assert agreeing(cut, chosen).tolist() == [1.0, 0.0, 0.0, 0.0, -5.0]


def test_agreement_by_hand():
    """τ = (3, -4), norm 5; the others' signs are (+, +) and (+, -): cosines (3 - 4) / (5 √2) and (3 + 4) / (5 √2)."""
    updates = [vector(3.0, -4.0), vector(1.0, 2.0), vector(5.0, -1.0)]
    found = agreement(updates[0], counted(updates, updates), 3)
    assert found == pytest.approx((-1 + 7) / 2 / (5 * math.sqrt(2)), abs=1e-15)


@pytest.mark.parametrize("clients", [2, 3, 7])
@pytest.mark.parametrize("parameters", [1, 10, 1000])
def test_agreement_is_the_mean_cosine_with_the_others_sign_vectors(clients, parameters):
    generator = torch.Generator().manual_seed(clients * parameters)
    updates = [torch.randn(parameters, generator=generator) for _ in range(clients)]
    sums = counted(updates, updates)
    for k, update in enumerate(updates):
        others = [other.sign().double() for j, other in enumerate(updates) if j != k]
        cosines = [torch.nn.functional.cosine_similarity(update.double(), other, dim=0) for other in others]
        assert agreement(update, sums, clients) == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-12)


def test_who_is_alone_or_moves_nothing_agrees_with_nobody():
    one, zero = vector(1.0, 2.0), vector(0.0, 0.0)
    assert agreement(one, counted([one], [one]), 1) == 0.0
    assert agreement(zero, counted([one, zero], [one, zero]), 2) == 0.0


def test_heterogeneity_by_hand():
    assert heterogeneity([0.5, -0.25, 0.0]) == [0.5, 1.0, 1.0]


def test_the_weights_that_clients_find_alone_are_those_of_the_softmax_over_all():
    told = [0.5, -0.25, 0.0]
    masses = [math.exp(1.0), math.exp(0.5), 1.0]  # (K - 1) |s|
    assert [weight(own, 0.5, 3) for own in told] == pytest.approx([mass / max(masses) for mass in masses])
    assert weight(0.7, 0.5, 3) == 1.0  # a false top makes nobody heavier


def test_the_merged_update_by_hand():
    """Two up of (p, n) = (2, 1) with Σ w τ̂ = 1.5, three down with -6, nobody elected; mean weight 0.5."""
    sums, chosen = election((2, 1), (0, 3), (1, 1)), torch.tensor([1, -1, 0], dtype=torch.int8)
    found = mean_of(torch.tensor([1.5, -6.0, 9.0], dtype=torch.float64), chosen, sums, 0.5)
    assert found.tolist() == [1.5 / (2 * 0.5), -6.0 / (3 * 0.5), 0.0]


def test_conflict_levels_by_hand():
    assert conflict_levels(election((3, 0), (2, 1), (0, 3), (1, 1), (0, 0)), 3).tolist() == [0, 2, 0, 3, 3]


@pytest.mark.parametrize("clients", [2, 3, 8])
def test_conflict_levels_are_those_of_the_updates(clients):
    generator = torch.Generator().manual_seed(clients)
    updates = [torch.randn(500, generator=generator).round() for _ in range(clients)]  # with zeros
    given = [{"w": update} for update in updates]
    levels = analyse.empty_levels(given)
    histogram = analyse.measure(given, levels=levels).histogram
    found = conflict_levels(counted(updates, updates), clients)
    assert torch.equal(found, levels["w"].long())
    assert torch.bincount(found, minlength=clients + 1).tolist() == histogram
