import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedproxy.aggregation.analyse import SEGMENT, conflict, conflict_of
from fedproxy.aggregation.merge import kernels, merge, merge_round
from fedproxy.aggregation.merge.top_k import thresholds
from fedproxy.errors import ArtifactError
from fedproxy.federation.merge_files import merge_files
from tests.aggregation.merge import merge_oracle
from tests.aggregation.merge.merge_oracle import agree, cases, flat, random_updates

pytest.importorskip("numba")

HALVES = [torch.float32, torch.bfloat16, torch.float16]
RULES = [
    ("mean", {}),
    ("ties", {}),
    ("h-ties", {}),
    ("h-ties", {"r0": 0.7, "delta": 0.5}),
    ("mean", {"clip_norm": 1.0}),
    ("h-ties", {"clip_norm": 1e-320}),
]
LENGTH = 2 * SEGMENT + 3001


def with_kernels(function):
    """The result on the kernels, whatever the size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SMALLEST", 0)
        return function()


def with_torch(function):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SMALLEST", 1 << 62)
        return function()


def long_updates(kind, dtype=torch.float32, clients=5):
    """Updates of a few segments in tensors whose borders fall inside of blocks."""
    generator = torch.Generator().manual_seed(clients)
    shared = torch.randn(LENGTH, generator=generator)
    updates = []
    for k in range(clients):
        values = torch.randn(LENGTH, generator=generator) * (1 + k) + shared
        if kind == "tied":
            values = values.round()
        elif kind == "sparse":
            values = values * (torch.rand(LENGTH, generator=generator) < 0.1)
        elif kind == "denormal":
            values = values * (1e-40 if dtype != torch.float16 else 1e-7)
        elif kind == "wide":
            values = values * 10.0 ** torch.randint(-6, 4, (LENGTH,), generator=generator)
        values = values.to(dtype)
        sizes = [700, 1, 511, 65_000, LENGTH - 66_212]
        names = ["b", "a", "scalar", "c.2", "c.1"]
        updates.append({name: part.clone() for name, part in zip(names, values.split_with_sizes(sizes), strict=True)})
        updates[-1]["scalar"], updates[-1]["none"] = (
            updates[-1]["scalar"].reshape(7, 73),
            torch.zeros(0, 3, dtype=dtype),
        )
    return updates


def assert_same(left, right):
    (merged, levels, analysis), (others, other_levels, other) = left, right
    assert analysis == other
    assert list(merged) == list(others)
    for name, tensor in merged.items():
        assert tensor.dtype == others[name].dtype
        assert tensor.shape == others[name].shape
        assert torch.equal(tensor, others[name]), name
        assert torch.equal(levels[name], other_levels[name]), name


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", cases(torch.float32))
def test_kernels_equal_the_float64_reference_and_the_bits_of_the_torch_path(case, dtype):
    updates = cases(dtype)[case]
    stack = np.stack([flat(update) for update in updates])
    rows = [2 * k + 1 for k in range(len(updates))]
    expected = {"mean": merge_oracle.mean(stack, rows), "ties": merge_oracle.ties(stack)}
    expected["h-ties"] = merge_oracle.h_ties(stack)
    for rule, options in RULES:
        found = with_kernels(lambda rule=rule, options=options: merge_round(updates, rule, rows=rows, **options))
        assert_same(
            found, with_torch(lambda rule=rule, options=options: merge_round(updates, rule, rows=rows, **options))
        )
        if not options:
            assert agree(found[0], expected[rule], dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["random", "tied", "sparse", "denormal", "wide"])
def test_kernels_give_the_bits_of_the_torch_path_across_blocks_and_segments(kind, dtype):
    updates = long_updates(kind, dtype)
    if kind == "wide" and dtype == torch.float16:
        updates = [{name: tensor.clamp(-60_000, 60_000) for name, tensor in update.items()} for update in updates]
    for rule, options in RULES:
        run = lambda rule=rule, options=options: merge_round(updates, rule, **options)  # noqa: E731
        assert_same(with_kernels(run), with_torch(run))


@pytest.mark.parametrize("rule", ["mean", "ties", "h-ties"])
def test_negative_zeros_are_zeros(rule):
    updates = [{"w": torch.tensor([-0.0, -0.0, 0.0, 2.0])}, {"w": torch.tensor([-0.0, 3.0, -1.0, -0.0])}]
    run = lambda: merge_round(updates, rule)  # noqa: E731
    assert_same(with_kernels(run), with_torch(run))


@pytest.mark.parametrize("clients", [1, 4, 9, 15, 16, 17, 40])
def test_groups_of_clients_do_not_show(clients):
    updates = long_updates("sparse", clients=clients)
    run = lambda: merge_round(updates, r0=0.9)  # noqa: E731
    assert_same(with_kernels(run), with_torch(run))


def test_many_clients_and_mixed_dtypes():
    updates = [
        {"a": update["a"].to(torch.bfloat16), "b": update["b"], "z": update["z"].half()}
        for update in random_updates(300, torch.float32)
        for update in [{"a": update["layer.a"], "b": update["layer.b"], "z": update["z"]}]
    ]
    found = with_kernels(lambda: merge_round(updates))
    assert_same(found, with_torch(lambda: merge_round(updates)))
    assert found[1]["a"].dtype == torch.int16


@pytest.mark.parametrize("kind", ["random", "tied"])
def test_threads_tasks_and_chunks_do_not_change_a_bit(monkeypatch, kind):
    updates = long_updates(kind)
    expected = with_kernels(lambda: merge_round(updates, r0=0.8))
    before = torch.get_num_threads()
    try:
        for threads, task in ((1, 1), (2, 1), (3, 1 << 30)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(kernels, "TASK_VALUES", task)
            monkeypatch.setattr(kernels, "RESIDENT_BYTES", task)
            assert_same(with_kernels(lambda: merge_round(updates, r0=0.8)), expected)
        torch.set_num_threads(2)
        for elements in (20_000, 1 << 20):
            merged, analysis = with_torch(lambda elements=elements: merge(updates, r0=0.8, chunk_elements=elements))
            assert_same((merged, expected[1], analysis), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["random", "tied", "sparse"])
def test_the_selection_is_that_of_the_torch_path(kind, dtype):
    updates = long_updates(kind, dtype, clients=4)
    keep = [LENGTH // 3, LENGTH - 1, 1, LENGTH // 20]
    for counts in (keep, [0, LENGTH, LENGTH + 5, 7]):
        assert kernels.Kernels(updates).select(counts).thresholds == thresholds(updates, counts)


@given(
    rows=st.lists(
        st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1e-45, 1.0, 2.0]), min_size=9, max_size=9),
        min_size=1,
        max_size=5,
    ),
    r0=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    rule=st.sampled_from(["h-ties", "ties", "mean"]),
)
@settings(max_examples=60, deadline=None)
def test_ties_at_the_threshold_go_to_the_lower_index(rows, r0, rule):
    updates = [{"b": torch.tensor(row[:4]), "c": torch.tensor(row[4:])} for row in rows]
    options = {"h-ties": {"r0": r0}, "ties": {"density": r0}, "mean": {}}[rule]
    run = lambda: merge_round(updates, rule, **options)  # noqa: E731
    assert_same(with_kernels(run), with_torch(run))


def test_an_update_that_deceives_the_sample_is_selected_exactly(monkeypatch):
    step = 40
    values = torch.randn(kernels.RUNS * step, generator=torch.Generator().manual_seed(0))
    places = torch.arange(len(values))
    seen = places % step < kernels.RUN
    updates = [{"w": torch.where(seen, values * 1e-3, values)}, {"w": torch.where(seen, 1.0, places % 7 + 2.0)}]
    found = []
    monkeypatch.setattr(kernels, "thresholds", lambda *given: found.append(given) or thresholds(*given))
    keep = [len(values) // 10, len(values) // 10]
    selection = kernels.Kernels(updates).select(keep)
    assert selection.thresholds == thresholds(updates, keep)
    assert len(found) == 2
    run = lambda: merge_round(updates, "ties", density=0.1)  # noqa: E731
    assert_same(with_kernels(run), with_torch(run))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_by_name(dtype, bad):
    updates = long_updates("random", dtype, clients=3)
    updates[1]["c.1"][2] = bad
    with pytest.raises(ArtifactError, match=r"shop: c\.1 holds a NaN or Inf \(flat index 2\)"):
        with_kernels(lambda: merge(updates, names=["bank", "shop", "home"]))


def test_levels_are_the_conflict():
    updates = long_updates("sparse", clients=4)
    _, levels, _ = with_kernels(lambda: merge_round(updates))
    assert levels["a"].dtype == torch.uint8
    expected = conflict(updates)
    assert all(torch.equal(value, expected[name]) for name, value in conflict_of(levels, 4).items())
    _, alone, analysis = with_kernels(lambda: merge_round(updates[:1]))
    assert not any(value.any() for value in alone.values())
    assert analysis.conflict_histogram == [LENGTH, 0]


@pytest.mark.parametrize("dtype", HALVES)
def test_mapped_files_give_the_same(tmp_path, dtype):
    updates = long_updates("random", dtype, clients=3)
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for update, path in zip(updates, paths, strict=True):
        save_file(update, path)
    analysis = with_kernels(lambda: merge_files(paths, tmp_path / "m", "h-ties", tmp_path / "c", names=["x", "y", "z"]))
    merged, expected = with_torch(lambda: merge(updates, names=["x", "y", "z"]))
    assert analysis == expected
    written, levels, disputed = load_file(tmp_path / "m"), load_file(tmp_path / "c"), conflict(updates)
    assert all(torch.equal(written[name], value) for name, value in merged.items())
    assert all(torch.equal(levels[name], value) for name, value in disputed.items())


def test_what_kernels_cannot_read_goes_to_torch(monkeypatch):
    monkeypatch.setattr(kernels, "SMALLEST", 0)
    assert kernels.kernels_for([{"w": torch.ones(3)}]) is not None
    assert kernels.kernels_for([{"w": torch.ones(3).double()}]) is None
    assert kernels.kernels_for([{"w": torch.ones(2, 3).T}]) is None
    assert kernels.kernels_for([{"w": torch.ones(3, device="meta")}]) is None
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert kernels.kernels_for([{"w": torch.ones(3)}]) is None


def test_small_inputs_do_not_load_the_kernels():
    assert kernels.kernels_for([{"w": torch.ones(1000)}] * 3) is None


def test_every_float16_is_read_exactly():
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.float16)
    values = values[values.isfinite()]
    merged, _ = with_kernels(lambda: merge([{"w": values}], "mean"))
    assert torch.equal(merged["w"], values)
    # As float32 neighbours in a mean with another client, so that reading and rounding are checked apart.
    both = [{"w": values}, {"w": values.flip(0)}]
    expected = ((values.double() + values.flip(0).double()) / 2).float().half()
    assert torch.equal(with_kernels(lambda: merge(both, "mean"))[0]["w"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_torch(dtype):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(2, 60_000, generator=generator) * 10.0 ** torch.randint(
        -9, 4, (2, 60_000), generator=generator
    )
    updates = [{"w": row.to(dtype)} for row in values]
    rows = [1, 2]
    expected = (updates[0]["w"].double() * (1 / 3) + updates[1]["w"].double() * (2 / 3)).float().to(dtype)
    assert torch.equal(with_kernels(lambda: merge(updates, "mean", rows=rows))[0]["w"], expected)
