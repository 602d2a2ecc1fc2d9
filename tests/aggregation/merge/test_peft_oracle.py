"""Our rules against PEFT's merge utilities, and where the two differ by definition.

PEFT merges one tensor at a time, with weights that need not sum to one; so all is one tensor here, except where that is
the point. It has neither our weights by rows (`mean`), nor H-TIES, nor the robust rules.
"""

import peft.utils.merge_utils as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.aggregation.merge import merge
from fedproxy.aggregation.merge.top_k import kept_count, thresholds, trimmed

NAMES = ["bank", "shop", "farm", "dock"]
LENGTH = 500


def updates_of(clients=3, length=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=generator) for _ in range(clients)]


def ours(updates, rule, **options):
    return merge([{"w": update} for update in updates], rule, names=NAMES[: len(updates)], **options)[0]["w"]


def wide(updates):
    return [update.double() for update in updates]


def close(found, expected):
    return torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("rows", [[1, 1, 1], [5, 1, 7]])
def test_the_mean_is_task_arithmetic_with_the_rows_shares(rows):
    updates = updates_of()
    expected = oracle.task_arithmetic(wide(updates), torch.tensor(rows).double() / sum(rows))
    assert close(ours(updates, "mean", rows=rows), expected)


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.998])
def test_trimming_is_magnitude_pruning(density):
    (update,) = updates_of(1)
    limits = thresholds([{"w": update}], [kept_count(density, LENGTH)])
    ((_, values),) = trimmed([{"w": update}], limits)
    assert torch.equal(values[0], oracle.prune(update, density, method="magnitude"))


@pytest.mark.parametrize("clients", [1, 2, 3, 4])
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties(density, clients):
    updates = updates_of(clients)
    expected = oracle.ties(wide(updates), torch.ones(clients), density)
    assert close(ours(updates, "ties", density=density), expected)


@given(values=st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_electing_a_sign_differs_only_where_the_sum_is_zero(values):
    # Ours elects none there: the coordinate is zero. PEFT's elects plus: it is the mean of the positive entries.
    # Electing by number ("frequency") instead of mass is PEFT's alone.
    stack = torch.tensor(values).double()
    expected = oracle.disjoint_merge(stack, oracle.calculate_majority_sign_mask(stack, method="total"))
    nobody = stack.sum(dim=0) == 0
    found = ours(list(stack.float()), "ties", density=1.0)
    assert close(found[~nobody], expected[~nobody])
    assert not found[nobody].any()
    assert close(
        torch.where(nobody, stack.clamp(min=0).sum(0) / (stack > 0).sum(0).clamp(min=1), 0.0), expected * nobody
    )


def test_of_equal_magnitudes_ours_keeps_the_lower_index_and_pefts_some():
    update = torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert ours([update], "ties", density=0.5).tolist() == [1.0, -1.0, 0.0, 0.0]
    assert oracle.prune(update, 0.5, method="magnitude").abs().sum() == 2.0


def test_ours_counts_what_is_kept_in_decimals_and_over_all_tensors():
    # 0.29 of 100 is 28.999999999999996 in floats. Two tensors of 50 share our 29; PEFT's keeps 14 of each.
    (update,) = updates_of(1, length=100)
    assert ours([update], "ties", density=0.29).count_nonzero() == 29
    assert oracle.prune(update, 0.29, method="magnitude").count_nonzero() == 28
    halves = {"a": 10 * update[:50], "b": update[50:]}
    merged, _ = merge([halves], "ties", density=0.29)
    kept = {name: int(tensor.count_nonzero()) for name, tensor in merged.items()}
    assert sum(kept.values()) == 29
    assert kept["a"] > kept["b"]
    assert oracle.prune(halves["a"], 0.29, method="magnitude").count_nonzero() == 14
