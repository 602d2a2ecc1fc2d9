"""What every merge rule must hold; a new row of `RULES` is tested without a line here."""

import itertools
import math

import pytest
import torch

from fedproxy.aggregation.analyse import measure
from fedproxy.aggregation.merge import RULES, configured, merge
from fedproxy.aggregation.merge.top_k import kept_count
from fedproxy.errors import ArtifactError, UsageError

SHAPES = {"b": (9,), "a": (6, 5), "c": (2, 3, 4), "empty": (0, 3), "scalar": ()}

pytestmark = pytest.mark.parametrize("rule", RULES)


def made(clients, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
        for _ in range(clients)
    ]


def times(update, factor):
    return {name: tensor * factor for name, tensor in update.items()}


def flat(tensors):
    return torch.cat([tensors[name].reshape(-1).double() for name in sorted(tensors)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_names_shapes_and_dtypes_come_back(rule, dtype):
    updates = [{**update, "b": update["b"].float()} for update in made(3, dtype=dtype)]
    merged, _ = merge(updates, rule)
    assert list(merged) == list(updates[0])
    for name, tensor in updates[0].items():
        assert (merged[name].shape, merged[name].dtype) == (tensor.shape, tensor.dtype)


def test_permuting_clients_changes_nothing(rule):
    updates, rows, names = made(4), [5, 1, 7, 2], ["bank", "shop", "farm", "dock"]
    merged, analysis = merge(updates, rule, rows=rows, names=names)
    for order in itertools.islice(itertools.permutations(range(4)), 1, None, 5):
        other, moved = merge(
            [updates[k] for k in order], rule, rows=[rows[k] for k in order], names=[names[k] for k in order]
        )
        assert torch.allclose(flat(other), flat(merged), rtol=1e-6, atol=0)
        if analysis.weights is not None:
            assert moved.weights == pytest.approx([analysis.weights[k] for k in order])
        assert moved.retention == pytest.approx([analysis.retention[k] for k in order])
        assert moved.conflict_histogram == analysis.conflict_histogram


@pytest.mark.parametrize("clients", [1, 2, 3, 7])
def test_identical_updates_merge_to_what_the_rule_keeps_of_one(rule, clients):
    update = made(1)[0]
    merged, analysis = merge([update] * clients, rule)
    options = configured(rule, {})[1]
    kept = kept_count(RULES[rule].keep(analysis, options)[0], analysis.parameters)
    largest = flat(update).abs().sort(descending=True, stable=True).indices[:kept]
    expected = torch.zeros(analysis.parameters, dtype=torch.float64)
    expected[largest] = flat(update)[largest]
    assert torch.equal(flat(merged), expected)


@pytest.mark.parametrize("factor", [2.0, 0.25, -1.0, 3.7, 1e-20])
def test_scaling_all_updates_scales_the_result(rule, factor):
    updates = made(4, seed=1, dtype=torch.float64)
    merged, _ = merge(updates, rule)
    scaled, _ = merge([times(update, factor) for update in updates], rule)
    assert torch.allclose(flat(scaled), factor * flat(merged), rtol=1e-9, atol=0)


@pytest.mark.parametrize("zeros", [1, 3])
def test_zero_updates_are_harmless(rule, zeros):
    updates = made(3, seed=2) + [times(made(1)[0], 0.0)] * zeros
    merged, analysis = merge(updates, rule, rows=[1] * len(updates))
    assert flat(merged).isfinite().all()
    assert flat(merged).any()
    assert analysis.weights is None or math.isclose(sum(analysis.weights), 1.0)


def test_only_zero_updates_merge_to_zero(rule):
    merged, analysis = merge([times(update, 0.0) for update in made(3)], rule)
    assert not flat(merged).any()
    assert analysis.zero_fraction == 1.0


def test_the_result_lies_between_the_updates_as_the_rule_scales_them_and_zero(rule):
    updates = made(5, seed=3)
    merged, _ = merge(updates, rule)
    scales = RULES[rule].scale(measure(updates, ["client"] * 5)) if RULES[rule].scale else [1.0] * 5
    scaled = [scale * flat(update) for scale, update in zip(scales, updates, strict=True)]
    stack = torch.stack([*scaled, torch.zeros(len(scaled[0]))])
    slack = 1e-6 * stack.abs().max()
    assert (flat(merged) <= stack.max(dim=0).values + slack).all()
    assert (flat(merged) >= stack.min(dim=0).values - slack).all()


@pytest.mark.parametrize("elements", [1, 8, 50, 10_000])
def test_the_chunk_size_does_not_change_the_result(rule, elements):
    updates = made(3, seed=4)
    merged, analysis = merge(updates, rule)
    other, again = merge(updates, rule, chunk_elements=elements)
    assert torch.equal(flat(other), flat(merged))
    assert again.zero_fraction == analysis.zero_fraction
    assert again.conflict_histogram == analysis.conflict_histogram


def test_the_same_input_gives_the_same_bits(rule):
    first, second = merge(made(4), rule), merge(made(4), rule)
    assert torch.equal(flat(first[0]), flat(second[0]))
    assert first[1] == second[1]


def test_the_row_and_its_name_agree_and_its_defaults_are_valid(rule):
    assert RULES[rule].name == rule
    assert configured(rule, {})[1] == RULES[rule].options()


def test_zero_fraction_counts_the_zeros_of_the_result(rule):
    merged, analysis = merge(made(3, seed=6), rule)
    assert analysis.zero_fraction == (flat(merged) == 0).double().mean().item()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_its_owner_named(rule, bad):
    updates = made(3)
    updates[1]["b"][4] = bad
    with pytest.raises(ArtifactError, match="shop: b holds a NaN or Inf"):
        merge(updates, rule, names=["bank", "shop", "farm"])


def test_one_client_alone_is_taken_as_it_is(rule):
    update = made(1, seed=7)[0]
    keep_all = {"density": 1.0} if rule == "ties" else {}
    merged, _ = merge([update], rule, rows=[3], **keep_all)
    assert torch.equal(flat(merged), flat(update))


def test_how_an_update_is_cut_into_tensors_does_not_matter(rule):
    updates, names = made(3, seed=8), ["bank", "shop", "farm"]
    merged, _ = merge(updates, rule, names=names)
    whole, _ = merge([{"all": flat(update).float()} for update in updates], rule, names=names)
    assert torch.equal(flat(whole), flat(merged))


@pytest.mark.parametrize("limit", [3.0, 1e-3, 1e-30, "median"])
def test_clipping_is_merging_the_clipped_updates(rule, limit):
    updates = [times(update, factor) for update, factor in zip(made(4, seed=9), (1.0, 5.0, 0.3, 40.0), strict=True)]
    norms = [flat(update).norm().item() for update in updates]
    bound = sum(sorted(norms)[1:3]) / 2 if limit == "median" else limit
    by_hand = [
        {name: tensor.double() * min(1.0, bound / norm) for name, tensor in update.items()}
        for update, norm in zip(updates, norms, strict=True)
    ]
    wide = [{name: tensor.double() for name, tensor in update.items()} for update in updates]
    merged, _ = merge(wide, rule, clip_norm=limit)
    assert torch.allclose(flat(merged), flat(merge(by_hand, rule)[0]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("limit", [2.0, 1e-30, "median"])
def test_clipping_leaves_the_analysis_alone(rule, limit):
    updates = made(4, seed=10)
    _, plain = merge(updates, rule, rows=[1, 2, 3, 4])
    _, analysis = merge(updates, rule, rows=[1, 2, 3, 4], clip_norm=limit)
    assert {**analysis.as_dict(), "zero_fraction": None} == {**plain.as_dict(), "zero_fraction": None}


def test_a_limit_that_nobody_reaches_changes_no_bit(rule):
    updates = made(4, seed=11)
    merged, analysis = merge(updates, rule, clip_norm=1e6)
    plain, expected = merge(updates, rule)
    assert torch.equal(flat(merged), flat(plain))
    assert analysis == expected


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf, "mean", True])
def test_a_wrong_limit_is_explained(rule, limit):
    with pytest.raises(UsageError, match=f"{rule}: clip_norm is"):
        merge(made(2), rule, clip_norm=limit)
