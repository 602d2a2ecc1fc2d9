import errno

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedproxy import checkpoint_files
from fedproxy.artifacts import write_json
from fedproxy.checkpoint_files import (
    model_identity,
    numbered_lists,
    open_checkpoint,
    require_space,
    split_number,
    weight_files,
    write_shards,
)
from fedproxy.errors import ArtifactError, ResourceError
from fedproxy.tensor_files import save_tensors


def checkpoint(folder, **config):
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "x", **config})
    save_tensors(folder / "model.safetensors", {"w": torch.zeros(2, 2)})
    return folder


def test_identity_sees_config_shapes_and_values_but_not_versions(tmp_path):
    first = model_identity(checkpoint(tmp_path / "1", transformers_version="5.0"))
    second = checkpoint(tmp_path / "2", transformers_version="5.1", _name_or_path="elsewhere")
    assert model_identity(second) == first
    save_tensors(second / "model.safetensors", {"w": torch.ones(2, 2)})
    assert model_identity(second) != first
    assert model_identity(checkpoint(tmp_path / "3", layers=2)) != first
    save_tensors(second / "model.safetensors", {"w": torch.ones(2, 3)})
    assert model_identity(second) != first


def test_identity_does_not_depend_on_the_sharding(tmp_path):
    values = {"a": torch.randn(40, 9), "b": torch.randn(3), "c": torch.zeros(0)}
    for name in ("whole", "sharded"):
        checkpoint(tmp_path / name)
    save_tensors(tmp_path / "whole" / "model.safetensors", values)
    (tmp_path / "sharded" / "model.safetensors").unlink()
    for name, value in values.items():
        save_tensors(tmp_path / "sharded" / f"{name}.safetensors", {name: value})
    index = {"weight_map": {name: f"{name}.safetensors" for name in values}}
    write_json(tmp_path / "sharded" / "model.safetensors.index.json", index)
    assert model_identity(tmp_path / "sharded") == model_identity(tmp_path / "whole")


@pytest.mark.parametrize("name", ["../w.safetensors", "missing.safetensors", "/etc/passwd", 3])
def test_an_index_cannot_point_elsewhere(tmp_path, name):
    folder = checkpoint(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "w.safetensors")
    save_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(1)})
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"w": name}})
    with pytest.raises(ArtifactError, match="names the shard"):
        weight_files(folder)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ArtifactError, match=r"config\.json is missing"):
        weight_files(tmp_path)
    write_json(tmp_path / "config.json", {})
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        weight_files(tmp_path)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.int64]


def values():
    generator = torch.Generator().manual_seed(0)
    made = {f"t.{i}": torch.randn(i, 5, generator=generator).to(dtype) for i, dtype in enumerate(DTYPES)}
    return {**made, "scalar": torch.tensor(3.0)}


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def test_where_tensors_lie(tmp_path):
    folder = checkpoint(tmp_path / "m")
    save_file(values(), folder / "model.safetensors", metadata={"format": "pt"})
    found = open_checkpoint(folder)
    assert found.config == {"model_type": "x"}
    assert found.bytes == sum(value.nbytes for value in values().values())
    for name, value in values().items():
        stored = found.tensors[name]
        assert (stored.torch_dtype, stored.shape) == (value.dtype, tuple(value.shape))
        assert torch.equal(raw(stored.read()), raw(value))


def test_the_dtype_is_one_to_compute_in(tmp_path):
    folder = checkpoint(tmp_path / "m")
    save_tensors(folder / "model.safetensors", {"a": torch.zeros(2).to(torch.float8_e5m2), "b": torch.zeros(2).half()})
    assert open_checkpoint(folder).dtype == torch.float16


def test_one_shard_copied_is_the_same_file_as_safetensors_writes(tmp_path):
    folder = checkpoint(tmp_path / "m")
    save_file(values(), folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "copy").mkdir()
    told = []
    write_shards(tmp_path / "copy", open_checkpoint(folder).shards, on_bytes=told.append)
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert told[-1] == open_checkpoint(folder).bytes
    assert told == sorted(told)


@settings(deadline=None)
@given(st.data())
def test_any_choice_of_tensors_under_any_names_over_any_shards(tmp_path_factory, data):
    """Names and places change, values do not; computed tensors are replaced; the index names what is where."""
    folder = checkpoint(tmp_path_factory.mktemp("m") / "m")
    save_file(values(), folder / "model.safetensors", metadata={"format": "pt"})
    tensors = open_checkpoint(folder).tensors
    chosen = data.draw(st.lists(st.sampled_from(sorted(tensors)), unique=True, min_size=1))
    places = [data.draw(st.integers(0, 2)) for _ in chosen]
    shards = [{f"new.{n}": tensors[n] for n, p in zip(chosen, places, strict=True) if p == i} for i in range(3)]
    computed = {f"new.{name}": lambda stored: stored.read() * 2 for name in chosen if name == "t.2"}
    out = tmp_path_factory.mktemp("out")
    write_shards(out, shards, computed=computed)
    write_json(out / "config.json", {})
    found = open_checkpoint(out)
    assert len(found.shards) == sum(1 for shard in shards if shard)
    assert found.tensors.keys() == {f"new.{name}" for name in chosen}
    for file in weight_files(out):
        load_file(file)
    for name in chosen:
        value = values()[name] * 2 if name == "t.2" else values()[name]
        assert torch.equal(raw(found.tensors[f"new.{name}"].read()), raw(value))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = checkpoint(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    for name in ("a", "b"):
        save_tensors(folder / f"{name}.safetensors", {"w": torch.zeros(1), name: torch.zeros(1)})
    index = {"a": "a.safetensors", "b": "b.safetensors", "w": "a.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    with pytest.raises(ArtifactError, match=r"'w'.*a\.safetensors.*b\.safetensors"):
        open_checkpoint(folder)


def test_what_the_shards_hold_counts_not_what_the_index_says_of_it(tmp_path):
    folder = checkpoint(tmp_path / "m")
    whole = set(open_checkpoint(folder).tensors)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = dict.fromkeys([*whole, "in.none"], "a.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    assert set(open_checkpoint(folder).tensors) == whole


def test_a_source_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    folder = checkpoint(tmp_path / "m")
    found = open_checkpoint(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="ends early"):
        found.tensors["w"].read()
    with pytest.raises(ArtifactError, match="ends early"):
        write_shards(tmp_path, found.shards)


def test_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "m")
    usage = checkpoint_files.shutil.disk_usage(tmp_path)
    require_space(tmp_path, usage.free // 2)
    with pytest.raises(ResourceError, match="GB are needed"):
        require_space(tmp_path, usage.free + 1)
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda path: usage._replace(free=10))
    (tmp_path / "out").mkdir()
    with pytest.raises(ResourceError):
        write_shards(tmp_path / "out", open_checkpoint(folder).shards)
    assert list((tmp_path / "out").iterdir()) == []


def test_numbers_in_names():
    assert split_number("model.layers.3.mlp.experts.7.w1.weight") == ("model.layers", 3, "mlp.experts.7.w1.weight")
    assert split_number("h.0.attn.c_attn.weight") == ("h", 0, "attn.c_attn.weight")
    assert split_number("model.norm.weight") is None
    assert split_number("model.layers.03.w") is None
    names = ["a.0.x", "a.1.x", "b.c.0.y", "b.c.2.y", "norm"]
    assert numbered_lists(names) == {"a": {0, 1}, "b.c": {0, 2}}


def test_file_systems_that_cannot_copy_ranges(tmp_path, monkeypatch):
    def refuse(*_args):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    folder = checkpoint(tmp_path / "m")
    save_file(values(), folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(checkpoint_files.os, "copy_file_range", refuse)
    (tmp_path / "copy").mkdir()
    write_shards(tmp_path / "copy", open_checkpoint(folder).shards)
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
