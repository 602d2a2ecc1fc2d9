import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedproxy.errors import ArtifactError
from fedproxy.tensor_files import read_header
from fedproxy.tensors import (
    ComputedTensors,
    MappedTensors,
    Span,
    check_finite,
    check_layout,
    chunks,
    outline,
    parameter_count,
    stacked,
)


def vector(tensors):
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def numbered(shapes, offset=0.0):
    tensors, position = {}, offset
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(position, position + count).reshape(shape)
        position += count
    return tensors


def test_chunks_follow_sorted_names_and_cross_tensor_borders():
    tensors = {"b": torch.zeros(2, 2), "a": torch.zeros(3), "empty": torch.zeros(0), "scalar": torch.zeros(())}
    assert list(chunks(tensors, 5)) == [
        [Span("a", 0, 3), Span("b", 0, 2)],
        [Span("b", 2, 4), Span("scalar", 0, 1)],
    ]


@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5), elements=st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_stacked_walks_give_the_whole_vectors_for_any_chunk_size(sizes, elements):
    shapes = {f"t{position}": (size,) for position, size in enumerate(sizes)}
    first, second = numbered(shapes), numbered(shapes, offset=100.0)
    pieces = [values.clone() for _, values in stacked([first, second], elements)]
    whole = torch.cat(pieces, dim=1) if pieces else torch.zeros(2, 0)
    assert torch.equal(whole, torch.stack([vector(first), vector(second)]))
    assert all(piece.numel() <= max(2, elements) for piece in pieces)
    assert parameter_count(first) == sum(sizes)


def test_stacked_reads_non_contiguous_tensors_in_their_logical_order():
    tensor = torch.arange(6.0).reshape(2, 3).T
    ((_, values),) = stacked([{"w": tensor}])
    assert values.tolist() == [[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, "w is missing"),
        ({"w": torch.zeros(2, 3), "x": torch.zeros(1)}, "x is unknown"),
        ({"w": torch.zeros(3, 2)}, r"w has shape \[3, 2\], expected \[2, 3\]"),
        ({"w": torch.zeros(2, 3, dtype=torch.bfloat16)}, "w has dtype torch.bfloat16, expected torch.float32"),
    ],
)
def test_check_layout_names_client_and_tensor(other, said):
    with pytest.raises(ArtifactError, match=f"bank: .*{said}"):
        check_layout({"w": torch.zeros(2, 3)}, other, "bank")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_finite_names_client_tensor_and_place(bad):
    tensors = {"a": torch.zeros(3), "b": torch.tensor([[0.0, 1.0], [bad, 0.0]])}
    with pytest.raises(ArtifactError, match=r"bank: b\b.*\b2\b"):
        check_finite(tensors, "bank")


def test_computed_tensors_are_computed_when_touched_and_not_for_their_shapes():
    made = []

    def compute(name):
        made.append(name)
        return torch.full((2, 3), float(name))

    tensors = ComputedTensors({name: outline((2, 3), torch.float32, torch.device("cpu")) for name in "12"}, compute)
    assert parameter_count(tensors) == 12
    assert (list(tensors), len(tensors), "1" in tensors, "3" in tensors) == (["1", "2"], 2, True, False)
    with pytest.raises(KeyError):
        tensors["3"]
    assert list(chunks(tensors, 9)) == list(chunks({name: torch.zeros(2, 3) for name in "12"}, 9))
    check_layout(tensors, {name: torch.zeros(2, 3) for name in "12"}, "bank")
    assert made == []
    assert vector(tensors).tolist() == [1.0] * 6 + [2.0] * 6
    assert made == ["1", "2"]
    for _ in stacked([tensors], 4):
        pass
    assert made == ["1", "2", "1", "2"]


def test_mapped_tensors_equal_the_saved_and_never_change_the_file(tmp_path):
    path = tmp_path / "t.safetensors"
    saved = {
        "f32": torch.randn(3, 2),
        "bf16": torch.randn(5).bfloat16(),
        "f16": torch.randn(1).half(),
        "f64": torch.randn(2).double(),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    save_file(saved, path)
    before = path.read_bytes()
    mapped = MappedTensors(path, read_header(path).entries)
    assert mapped.keys() == saved.keys()
    for name, tensor in saved.items():
        assert mapped[name].dtype == tensor.dtype
        assert torch.equal(mapped[name], tensor)
    mapped["f32"].zero_()
    assert torch.equal(mapped["f32"], saved["f32"])
    assert path.read_bytes() == before


def test_mapped_tensors_may_lie_off_their_alignment(tmp_path):
    path = tmp_path / "odd.safetensors"
    header = (
        b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}'
    )
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\x80\x3f" + struct.pack("<f", 1.5))
    mapped = MappedTensors(path, read_header(path).entries)
    assert mapped["a"].tolist() == [1.0]
    assert mapped["b"].tolist() == [1.5]


def test_mapping_refuses_integers(tmp_path):
    path = tmp_path / "i.safetensors"
    save_file({"count": torch.zeros(2, dtype=torch.int64)}, path)
    with pytest.raises(ArtifactError, match="count has dtype I64"):
        MappedTensors(path, read_header(path).entries)


def test_mapping_a_missing_file_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match="gone"):
        MappedTensors(tmp_path / "gone", {})
