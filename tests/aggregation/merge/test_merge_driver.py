import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedproxy.aggregation.analyse import conflict
from fedproxy.aggregation.merge import merge
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.federation.merge_files import merge_files
from tests.aggregation.merge.merge_oracle import random_updates


@pytest.fixture
def files(tmp_path):
    updates = random_updates(3, torch.float32)
    paths = [tmp_path / f"client{k}.safetensors" for k in range(3)]
    for update, path in zip(updates, paths, strict=True):
        save_file(update, path)
    return updates, paths


@pytest.mark.parametrize("rule", ["mean", "ties", "h-ties"])
def test_files_give_the_same_as_memory(files, tmp_path, rule):
    updates, paths = files
    out, disputed = tmp_path / "merged.safetensors", tmp_path / "conflict.safetensors"
    rows = [1, 2, 3] if rule == "mean" else None
    analysis = merge_files(paths, out, rule, disputed, rows=rows)
    merged, expected = merge(updates, rule, rows=rows, names=[str(path) for path in paths])
    assert analysis == expected
    written = load_file(out)
    assert written.keys() == merged.keys()
    assert all(torch.equal(written[name], merged[name]) for name in merged)
    levels = load_file(disputed)
    assert all(torch.equal(levels[name], value) for name, value in conflict(updates).items())
    json.dumps(analysis.as_dict(), allow_nan=False)


def test_the_same_input_gives_the_same_bytes(files, tmp_path):
    _, paths = files
    merge_files(paths, tmp_path / "one", "h-ties")
    merge_files(paths, tmp_path / "two", "h-ties")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_output_is_replaced_only_on_demand(files, tmp_path):
    _, paths = files
    out = tmp_path / "out"
    out.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists"):
        merge_files(paths, out, "mean")
    with pytest.raises(UsageError, match="exists"):
        merge_files(paths, tmp_path / "new", "mean", conflict_out=out)
    assert out.read_bytes() == b"precious"
    assert not (tmp_path / "new").exists()
    merge_files(paths, out, "mean", overwrite=True)
    assert load_file(out)


def test_no_update_is_replaced_by_the_result(files, tmp_path):
    updates, paths = files
    (tmp_path / "link").symlink_to(paths[1])
    for out in (paths[0], tmp_path / "link"):
        with pytest.raises(UsageError, match="which is read"):
            merge_files(paths, out, "mean", overwrite=True)
        with pytest.raises(UsageError, match="which is read"):
            merge_files(paths, tmp_path / "new", "mean", conflict_out=out, overwrite=True)
    assert not (tmp_path / "new").exists()
    assert torch.equal(load_file(paths[0])["z"], updates[0]["z"])


def test_merged_and_conflict_need_two_files(files, tmp_path):
    with pytest.raises(UsageError, match="same file"):
        merge_files(files[1], tmp_path / "x", "mean", conflict_out=tmp_path / "x")


@pytest.mark.parametrize("damage", ["nan", "truncated", "missing", "renamed", "shape"])
def test_a_damaged_file_is_named_and_nothing_is_written(files, tmp_path, damage):
    updates, paths = files
    bad = paths[1]
    if damage == "nan":
        save_file({**updates[1], "z": torch.full((2, 3, 5), float("nan"))}, bad)
    elif damage == "truncated":
        os.truncate(bad, bad.stat().st_size - 4)
    elif damage == "missing":
        bad.unlink()
    elif damage == "renamed":
        save_file({f"{name}.x": value for name, value in updates[1].items()}, bad)
    else:
        save_file({**updates[1], "z": torch.zeros(30)}, bad)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArtifactError, match="client1"):
        merge_files(paths, tmp_path / "out", "h-ties", conflict_out=tmp_path / "conflict")
    assert sorted(tmp_path.iterdir()) == before


def test_gradients_and_inputs_are_left_alone():
    updates = [{"w": torch.tensor([1.0, -2.0, 3.0], requires_grad=True)} for _ in range(2)]
    merged, _ = merge(updates, "ties", density=0.4)
    assert merged["w"].tolist() == [0.0, 0.0, 3.0]
    assert not merged["w"].requires_grad
    assert updates[0]["w"].tolist() == [1.0, -2.0, 3.0]


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        ("hties", {}, "Unknown merge rule 'hties'. Did you mean 'h-ties'"),
        ("h-ties", {"roh": 1.2}, "Unknown option of the merge rule h-ties 'roh'. Did you mean 'rho'"),
        ("h-ties", {"rho": "much"}, "rho is 'much'; it must be a number"),
        ("h-ties", {"rho": True}, "rho is True; it must be a number"),
        ("h-ties", {"rho": 0.9}, "rho is 0.9; it must lie between 1 and"),
        ("h-ties", {"delta": float("nan")}, "delta is nan"),
        ("ties", {"density": 1.5}, "density is 1.5; it must lie between 0 and 1"),
        ("mean", {"weights": "row"}, "weights is 'row'; it must be one of 'rows', 'uniform'"),
    ],
)
def test_a_wrong_rule_or_option_is_explained(rule, options, said):
    with pytest.raises(UsageError) as caught:
        merge([{"w": torch.ones(2)}], rule, **options)
    assert said in str(caught.value)


def test_no_update_is_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="no update"):
        merge([], "mean")
    with pytest.raises(UsageError, match="no update"):
        merge_files([], tmp_path / "out", "mean")
