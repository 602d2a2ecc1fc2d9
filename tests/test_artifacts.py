import errno
import json
import os
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedproxy.artifacts import Manifest, new_directory, new_file, os_error, read_json, write_json
from fedproxy.checkpoint_files import model_identity, weight_files
from fedproxy.errors import ArtifactError, ResourceError, UsageError
from fedproxy.tensor_files import load_tensors, read_header, save_tensors, write_tensors


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(3, 5, generator=generator),
        "a": torch.randn(7, generator=generator).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2, dtype=torch.int64),
    }


def test_safetensors_reads_what_we_write(tmp_path):
    save_tensors(tmp_path / "t.safetensors", tensors(), metadata={"kind": "x"})
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], value) for name, value in tensors().items())
    assert read_header(tmp_path / "t.safetensors").metadata["kind"] == "x"


def test_same_tensors_same_bytes_in_any_order_and_chunking(tmp_path):
    save_tensors(tmp_path / "1", tensors())
    save_tensors(tmp_path / "2", dict(reversed(tensors().items())))
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in tensors().items()}
    pieces = [p for name in sorted(tensors()) for p in tensors()[name].reshape(-1).split(2)]
    write_tensors(tmp_path / "3", layout, pieces)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() == (tmp_path / "3").read_bytes()


def test_we_read_what_safetensors_writes(tmp_path):
    save_file(tensors(), tmp_path / "t")
    assert all(torch.equal(load_tensors(tmp_path / "t")[name], value) for name, value in tensors().items())


def damaged(name, header, body=b"\0" * 8):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return pytest.param(struct.pack("<Q", len(text)) + text + body, id=name)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x01\x02", id="short"),
        pytest.param(struct.pack("<Q", 10**15) + b"{}", id="header longer than the file"),
        pytest.param(b"\x80\x04pickle..............", id="a pickle"),
        damaged("no json", b"{{{{"),
        damaged("truncated data", {"a": ENTRY}, b"\0" * 4),
        damaged("padded data", {"a": ENTRY}, b"\0" * 12),
        damaged("overlap", {"a": ENTRY, "b": ENTRY}),
        damaged("out of range", {"a": {**ENTRY, "data_offsets": [8, 16]}}),
        damaged("wrong size", {"a": {**ENTRY, "shape": [3]}}),
        damaged("negative", {"a": {**ENTRY, "shape": [-2]}}),
        damaged("gigantic", {"a": {**ENTRY, "shape": [2**62, 2**62]}}),
        damaged("unknown dtype", {"a": {**ENTRY, "dtype": "F99"}}),
        damaged("duplicate key", b'{"a": %(e)s, "a": %(e)s}' % {b"e": json.dumps(ENTRY).encode()}),
        damaged("not a table", b"[1, 2]"),
    ],
)
def test_damaged_and_hostile_headers_are_refused(tmp_path, content):
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"t\.safetensors"):
        load_tensors(tmp_path / "t.safetensors")


@given(st.data())
def test_any_truncation_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("t") / "t"
    save_tensors(path, tensors())
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ArtifactError):
        load_tensors(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "f") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "old"


def test_a_failed_directory_leaves_the_old_one_and_nothing_else(tmp_path):
    with new_directory(tmp_path / "d") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "d", overwrite=True) as folder:
        (folder / "x").write_text("new")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert (tmp_path / "d" / "x").read_text() == "old"
    with new_directory(tmp_path / "d", overwrite=True) as folder:
        (folder / "y").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["d", "y"]


def test_existing_output_needs_overwrite(tmp_path):
    write_json(tmp_path / "f", 1)
    with pytest.raises(UsageError, match="--overwrite"), new_file(tmp_path / "f", overwrite=False):
        pass
    with pytest.raises(UsageError, match="--overwrite"), new_directory(tmp_path):
        pass


def test_unwritable_and_full_disks_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"), new_directory(tmp_path / "file" / "sub"):
        pass
    with pytest.raises(ResourceError, match="Free some space"), new_file(tmp_path / "full"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os_error(OSError(errno.EROFS, "read-only"), tmp_path).exit_code == 2


def test_json_errors_name_the_file(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "missing.json"):
        with pytest.raises(ArtifactError, match=name):
            read_json(tmp_path / name)


def manifest(**changes):
    values = {"kind": "proxy", "llm_sha256": "0" * 64, "llm_blocks": 4, "layer_map": [0, 3], "scores": [1.0, 0, 0, 1]}
    return Manifest(**{**values, **changes})


def test_manifest_round_trip(tmp_path):
    manifest(settings={"remove": 0.5}, seed=3).write(tmp_path)
    assert Manifest.read(tmp_path) == manifest(settings={"remove": 0.5}, seed=3)
    assert read_json(tmp_path / "fedproxy.json")["llm"] == {"sha256": "0" * 64, "blocks": 4}


@pytest.mark.parametrize("layer_map", [[], [3, 0], [0, 0], [0, 4], [-1, 2], ["0"], None, [True]])
def test_impossible_layer_maps_are_refused(tmp_path, layer_map):
    manifest(layer_map=layer_map).write(tmp_path)
    with pytest.raises(ArtifactError, match="layer_map"):
        Manifest.read(tmp_path)


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
