import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedproxy.aggregation.merge import merge
from fedproxy.aggregation.merge.h_ties import HTiesOptions
from fedproxy.aggregation.merge.h_ties import h_ties as combine
from tests.aggregation.merge.merge_oracle import agree, cases, flat, h_ties, random_updates

HALVES = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)


def elect(*column, rho=1.1):
    values = torch.tensor(column, dtype=torch.float64)[:, None]
    return combine(values, HALVES, HTiesOptions(rho=rho)).item()


def test_mass_decides_and_the_agreeing_average_by_hand_eq_12_to_14():
    # Weighted: 1, -0.25, 0.5: p = 1.5, n = 0.25; agreeing weights 0.5 and 0.25.
    assert elect(2.0, -1.0, 2.0) == 1.5 / 0.75
    # Weighted: 0.5, -1, -1: n = 2 ≥ 1.1 · 0.5.
    assert elect(1.0, -4.0, -4.0) == -2.0 / 0.5
    # One client that kept the coordinate is not diluted by the others.
    assert elect(0.0, 3.0, 0.0) == 3.0


def test_no_dominant_sign_drops_the_coordinate():
    # Weighted: 1 against 1.
    assert elect(2.0, -2.0, -2.0) == 0.0
    # 1.05 against 1 is short of 1.1; of 1.05 it is enough.
    assert elect(2.1, -2.0, -2.0) == 0.0
    assert elect(2.1, -2.0, -2.0, rho=1.05) == pytest.approx(2.1)
    assert elect(0.0, 0.0, 0.0) == 0.0


def test_equal_masses_at_rho_one_elect_plus_whatever_the_rounding():
    values = torch.tensor([[0.1, 0.3], [0.2, -0.2], [-0.3, -0.1]], dtype=torch.float64)
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert (combine(values, weights, HTiesOptions(rho=1.0)) > 0).all()
    assert (combine(values.flip(0), weights, HTiesOptions(rho=1.0)) > 0).all()


def test_the_whole_rule_by_hand_eq_11_to_14():
    # τ_0 = (4, 3, 0, 0, 0), τ_1 = (3, 4, 0, 0, 0), τ_2 = (-2, 2, 1, 0, 4), norms 5: products 24, -2, 2; cosines
    # 0.96, -0.08, 0.08. h = 1 - (0.96 + 0)/2 = 0.52, 1 - (0.96 + 0.08)/2 = 0.48, 1 - 0.08/2 = 0.96.
    # ĥ = 1/12, 0, 1: r = 1 - 0.2/12, 1, 0.8 → keep 4, 5 and 4 of 5: client 2's smallest non-zero entry, 1, is its
    # fourth largest and stays; with δ = 0.4, r_2 = 0.6 keeps 3 and it goes.
    updates = [
        {"w": torch.tensor(row)}
        for row in ([4.0, 3.0, 0.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0, 0.0], [-2.0, 2.0, 1.0, 0.0, 4.0])
    ]
    scores = [math.exp(0.96 + 0.08), math.exp(0.96 + 0.08), math.exp(0.08 + 0.08)]
    w = [score / sum(scores) for score in scores]
    merged, analysis = merge(updates)
    assert analysis.weights == pytest.approx(w)
    assert analysis.retention == pytest.approx([1 - 0.2 / 12, 1.0, 0.8])
    second = w[0] * 3 + w[1] * 4 + w[2] * 2
    assert merged["w"].tolist() == pytest.approx([3.5, second, 1.0, 0.0, 4.0])
    assert analysis.zero_fraction == 0.2
    assert merge(updates, delta=0.4)[0]["w"].tolist() == pytest.approx([3.5, second, 0.0, 0.0, 4.0])


@pytest.mark.parametrize("options", [{}, {"rho": 1.0}, {"rho": 2.0, "r0": 0.5, "delta": 0.4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases(torch.float32))
def test_h_ties_equals_the_reference(case, dtype, options):
    updates = cases(dtype)[case]
    expected = h_ties(np.stack([flat(update) for update in updates]), **options)
    assert agree(merge(updates, "h-ties", **options)[0], expected, dtype)


HIDES_A_THIRD = [
    [0] * 12,
    [0, 0, 0, -2, -2, -2, 1, 1, 2, 3, 0, 3],
    [0, 1, 2, -2, -3, 0, 2, -2, -3, -2, 0, 3],
    [0, 2, 3, 0, -2, -3, -1, -1, 3, 3, 1, -1],
]
"""One client keeps a third of its entries, which its arithmetic gives as 0.33333333333333326."""


@example(grid=HIDES_A_THIRD, rho=1.1, delta=0.9)
@given(
    grid=st.integers(1, 5).flatmap(
        lambda clients: st.lists(
            st.lists(st.integers(-3, 3), min_size=12, max_size=12), min_size=clients, max_size=clients
        )
    ),
    rho=st.sampled_from([1.1, 1.5]),
    delta=st.sampled_from([0.0, 0.2, 0.9]),
)
@settings(max_examples=150, deadline=None)
def test_h_ties_equals_the_reference_on_any_small_grid(grid, rho, delta):
    updates = [{"a": torch.tensor(row[:5]).float(), "b": torch.tensor(row[5:]).float()} for row in grid]
    stack = np.array(grid, dtype=np.float64)
    expected = h_ties(stack, rho * (1 - 1e-12), delta=delta)
    assert agree(merge(updates, "h-ties", rho=rho, delta=delta)[0], expected, torch.float32)


def test_options_reach_the_analysis():
    updates = random_updates(4, torch.float32)
    assert min(merge(updates, delta=0.7)[1].retention) == pytest.approx(0.3)
    assert merge(updates, delta=0.0)[1].retention == [1.0] * 4
