import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedproxy.errors import ArtifactError
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
