"""What every space must hold; a new row of `SPACES` is tested without a line here."""

import itertools
import math

import pytest
import torch

from fedproxy.aggregation.merge import RULES, merge, merge_round
from fedproxy.aggregation.space import SPACES, trained
from fedproxy.errors import ArtifactError, UsageError
from tests.aggregation.space.adapters import adapter, distance, plus, products, same_bits, zeros

every = pytest.mark.parametrize("row", SPACES.values(), ids=SPACES)
NAMES = ["bank", "dock", "farm", "shop"]


def updates_of(row, start, clients=4, scale=0.1):
    return [trained(row, adapter(seed=k + 1, scale=scale)) for k in range(clients)]


def merged_by(row, start, updates, rule="mean", names=None):
    vectors = [row.vector(start, update) for update in updates]
    return row.apply(start, merge(vectors, rule, names=names)[0])


@every
def test_the_row_and_its_name_agree(row):
    assert SPACES.choose(row.name) is row


def test_an_unknown_space_is_explained():
    with pytest.raises(UsageError, match=r"Unknown space 'products'\. Did you mean 'product'"):
        SPACES.choose("products")


@every
@pytest.mark.parametrize("rule", RULES)
def test_names_shapes_and_dtypes_come_back(row, rule):
    start = adapter()
    after = merged_by(row, start, updates_of(row, start), rule)
    assert after.keys() == start.keys()
    assert all((after[n].shape, after[n].dtype) == (start[n].shape, start[n].dtype) for n in start)
    assert all(tensor.isfinite().all() for tensor in after.values())


@every
def test_the_mean_of_one_client_gives_that_clients_adapter(row):
    start = adapter()
    (update,) = updates_of(row, start, clients=1)
    after = merged_by(row, start, [update])
    assert distance(products(after), products({**start, **plus(trained(row, start), update)})) <= 1e-6


@every
def test_updates_of_zero_change_no_product(row):
    for start in (adapter(), adapter(b_scale=0.0)):
        after = merged_by(row, start, [zeros(trained(row, start))] * 3)
        assert distance(products(after), products(start)) <= 1e-6


@every
@pytest.mark.parametrize("rule", ["mean", "h-ties", "median"])
def test_permuting_clients_changes_nothing(row, rule):
    start = adapter()
    updates = updates_of(row, start)
    expected = products(merged_by(row, start, updates, rule, NAMES))
    for order in itertools.islice(itertools.permutations(range(4)), 1, None, 7):
        after = merged_by(row, start, [updates[k] for k in order], rule, [NAMES[k] for k in order])
        assert distance(products(after), expected) <= 1e-6


@every
def test_the_same_input_gives_the_same_bits_and_leaves_the_global_generator_alone(row):
    start = adapter()
    updates = updates_of(row, start)
    state = torch.random.get_rng_state()
    assert same_bits(merged_by(row, start, updates), merged_by(row, start, updates))
    assert torch.equal(torch.random.get_rng_state(), state)


@every
def test_what_is_given_stays_as_it_is(row):
    start = adapter()
    updates = updates_of(row, start)
    copies = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in (start, *updates)]
    merged_by(row, start, updates)
    if row.for_rank:
        row.for_rank(start, 2)
    assert all(same_bits(tensors, copy) for tensors, copy in zip((start, *updates), copies, strict=True))


@every
def test_what_does_not_train_comes_back_to_the_bit(row):
    start = adapter()
    after = merged_by(row, start, updates_of(row, start))
    assert trained(row, start)
    assert same_bits(
        {n: after[n] for n in after if not row.trains(n)}, {n: start[n] for n in start if not row.trains(n)}
    )


@every
def test_an_update_of_another_layout_is_refused(row):
    start = adapter()
    (update,) = updates_of(row, start, clients=1)
    name = next(name for name in update if row.trains(name))
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        row.vector(start, {other: tensor for other, tensor in update.items() if other != name})
    with pytest.raises(ArtifactError, match="bias is unknown"):
        row.vector(start, {**update, "bias": torch.zeros(2)})
    with pytest.raises(ArtifactError, match=f"{name} has shape"):
        row.vector(start, {**update, name: torch.zeros(1, 1)})


@every
def test_a_merged_vector_of_another_layout_is_refused(row):
    start = adapter()
    (update,) = updates_of(row, start, clients=1)
    merged = dict(row.vector(start, update))
    name = sorted(merged)[0]
    with pytest.raises(ArtifactError, match=name):
        row.apply(start, {other: tensor for other, tensor in merged.items() if other != name})
    with pytest.raises(ArtifactError, match="foreign"):
        row.apply(start, {**merged, "foreign": torch.zeros(2)})
    with pytest.raises(ArtifactError, match=rf"{name} has shape \[1, 1\]"):
        row.apply(start, {**merged, name: torch.zeros(1, 1)})


@every
def test_the_merged_coordinates_are_trained_parameters_where_they_last(row):
    start = adapter()
    (update,) = updates_of(row, start, clients=1)
    vector = row.vector(start, update)
    fits = vector.keys() == update.keys() and all(vector[name].shape == update[name].shape for name in update)
    assert row.lasting == fits


@every
def test_disagreement_is_told_of_each_trained_parameter_and_is_nowhere_more_or_less_than_what_is_merged_has(row):
    start = adapter()
    vectors = [row.vector(start, update) for update in updates_of(row, start)]
    merged, levels, _ = merge_round(vectors)
    after = row.apply(start, merged)
    told = row.levels(after, levels)
    assert {name: t.shape for name, t in told.items()} == {name: t.shape for name, t in trained(row, after).items()}
    assert all(not tensor.is_floating_point() for tensor in told.values())
    for level in (0, 4):
        same = row.levels(after, {name: torch.full_like(tensor, level) for name, tensor in levels.items()})
        assert all(bool((tensor == level).all()) for tensor in same.values())
    assert row.levels(after, {}) == {}


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_by_the_merge(row, bad):
    start = adapter()
    updates = updates_of(row, start)
    next(iter(updates[1].values()))[0, 0] = bad
    with pytest.raises(ArtifactError, match=r"dock: .* holds a NaN or Inf"):
        merged_by(row, start, updates, names=NAMES)
