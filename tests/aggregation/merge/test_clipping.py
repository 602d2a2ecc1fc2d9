import pytest
import torch

from fedproxy.aggregation.merge import RULES, configured, merge
from fedproxy.aggregation.merge.clipping import clip_factors, clipped
from fedproxy.errors import UsageError
from fedproxy.federation.merge_files import merge_files
from fedproxy.tensor_files import load_tensors, save_tensors


def gram(*norms):
    return torch.tensor(norms, dtype=torch.float64).square().diag()


def test_factors_by_hand():
    assert clip_factors(gram(5.0, 1.0, 2.0), 2.0) == [0.4, 1.0, 1.0]
    assert clip_factors(gram(5.0, 1.0, 2.0), "median") == [0.4, 1.0, 1.0]
    assert clip_factors(gram(8.0, 1.0, 3.0, 5.0), "median") == [0.5, 1.0, 1.0, 0.8]


def test_a_zero_update_is_left_alone():
    assert clip_factors(gram(0.0, 4.0), 2.0) == [1.0, 0.5]
    assert clip_factors(gram(0.0, 0.0, 0.0), "median") == [1.0, 1.0, 1.0]
    assert clip_factors(gram(0.0, 0.0, 3.0), "median") == [1.0, 1.0, 0.0]


def test_the_mean_of_clipped_updates_by_hand():
    # Norms 5 and 0.5: the first is halved... to 2.5, the second stays.
    updates = [{"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 0.5])}]
    merged, _ = merge(updates, "mean", clip_norm=2.5)
    assert merged["w"].tolist() == [0.75, 1.25]


def test_a_boosted_update_counts_no_more_than_the_median_one():
    generator = torch.Generator().manual_seed(0)
    honest = [{"w": torch.randn(100, generator=generator)} for _ in range(4)]
    attack = {"w": torch.randn(100, generator=generator)}
    merged = [merge([*honest, {"w": attack["w"] * boost}], "mean", clip_norm="median")[0]["w"] for boost in (1e3, 1e6)]
    assert torch.allclose(merged[0], merged[1], rtol=1e-5)


@pytest.mark.parametrize("rule", ["ties", "h-ties"])
def test_what_is_kept_is_chosen_before_clipping(rule):
    # Clipped to 1e-60, float32 would round everything to zero; the values that count are those before.
    updates = [{"w": torch.tensor([1e-20, 3e-20, 2e-20, -4e-20])}] * 2
    wide = [{"w": update["w"].double()} for update in updates]
    options = {"density": 0.5} if rule == "ties" else {"r0": 0.5}
    kept = merge(updates, rule, **options)[0]["w"] != 0
    merged, analysis = merge(wide, rule, clip_norm=1e-60, **options)
    assert ((merged["w"] != 0) == kept).all()
    assert kept.tolist() == [False, True, False, True]
    assert analysis.zero_fraction == 0.5


def test_files_are_clipped_alike(tmp_path):
    updates = [{"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 0.5])}]
    paths = [tmp_path / "one", tmp_path / "two"]
    for path, update in zip(paths, updates, strict=True):
        save_tensors(path, update)
    merge_files(paths, tmp_path / "out", "mean", clip_norm="median")
    expected = merge(updates, "mean", clip_norm="median")[0]
    assert torch.equal(load_tensors(tmp_path / "out")["w"], expected["w"])


def test_clipping_wraps_the_row_and_leaves_the_registry_alone():
    rule, options = configured("h-ties", {"clip_norm": 2, "rho": 1.3})
    assert options.rho == 1.3
    assert rule.scale is not None
    assert RULES["h-ties"].scale is None
    assert configured("h-ties", {"clip_norm": None})[0] is RULES["h-ties"]
    assert clipped(RULES["mean"], 1.0).combine is RULES["mean"].combine


def test_a_mistyped_option_is_told_apart_from_clipping():
    with pytest.raises(UsageError, match=r"Did you mean 'clip_norm'\? Known: weights, clip_norm"):
        configured("mean", {"clipnorm": 1.0})
