import math

import pytest
import torch

from fedproxy.aggregation.merge import merge
from fedproxy.aggregation.merge.dare import drop_and_rescale
from fedproxy.aggregation.merge.rule import Place
from fedproxy.errors import UsageError

NAMES = ["bank", "shop", "farm"]


def drawn(start, width, drop=0.5, names=NAMES, seed=3):
    return drop_and_rescale(torch.ones(len(names), width, dtype=torch.float64), Place(start, names, seed), drop)


def updates_of(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(length, generator=generator)} for _ in NAMES]


def test_what_is_dropped_depends_on_seed_client_and_index_alone():
    whole = drawn(0, 1000)
    assert torch.equal(torch.cat([drawn(0, 1), drawn(1, 6), drawn(7, 993)], dim=1), whole)
    assert torch.equal(drawn(0, 1000, names=NAMES[::-1]), whole.flip(0))
    assert torch.equal(drawn(0, 1000, names=NAMES[1:]), whole[1:])
    other = drawn(0, 1000, seed=4)
    assert 0.4 < (other == whole).double().mean() < 0.6
    assert 0.4 < (whole[0] == whole[1]).double().mean() < 0.6


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_the_share_dropped_is_the_probability_and_the_mean_stays(drop):
    values = drawn(0, 200_000, drop)
    deviation = math.sqrt(drop * (1 - drop) / values.numel())
    assert abs((values == 0).double().mean().item() - drop) <= 5 * deviation
    assert abs(values.mean().item() - 1.0) <= 5 * deviation / (1 - drop) + 1e-12
    assert torch.equal(values[values != 0], torch.full_like(values[values != 0], 1 / (1 - drop)))


def test_neighbouring_draws_are_uncorrelated():
    kept = (drawn(0, 200_000) != 0).double() - 0.5
    for lag in (1, 2, 3, 64):
        assert (kept[:, lag:] * kept[:, :-lag]).mean().abs().item() / 0.25 < 5 / math.sqrt(600_000)


def test_dare_by_hand():
    updates = updates_of(40)
    kept = drawn(0, 40, drop=0.75, seed=9) / 4
    merged, _ = merge(updates, "dare", names=NAMES, rows=[1, 1, 2], seed=9, drop=0.75)
    expected = sum(
        share * 4 * update["w"].double() * mask
        for share, update, mask in zip((0.25, 0.25, 0.5), updates, kept, strict=True)
    )
    assert torch.equal(merged["w"], expected.float())
    even, _ = merge(updates, "dare", names=NAMES, rows=[1, 1, 2], seed=9, drop=0.75, weights="uniform")
    assert not torch.equal(even["w"], merged["w"])


def test_nothing_dropped_is_the_mean_and_ties_without_trimming():
    updates = updates_of(60)
    for rule, plain, options in (("dare", "mean", {}), ("dare-ties", "ties", {"density": 1.0})):
        merged, analysis = merge(updates, rule, rows=[1, 2, 3], drop=0.0)
        expected, same = merge(updates, plain, rows=[1, 2, 3], **options)
        assert torch.equal(merged["w"], expected["w"])
        assert analysis == same


@pytest.mark.parametrize("rule", ["dare", "dare-ties"])
@pytest.mark.parametrize("drop", [-0.1, 1.0, float("nan")])
def test_the_probability_has_limits(rule, drop):
    with pytest.raises(UsageError, match=f"{rule}: drop is"):
        merge(updates_of(3), rule, drop=drop)
