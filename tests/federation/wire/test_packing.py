import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.errors import ArtifactError
from fedproxy.federation.wire import packing
from fedproxy.federation.wire.packing import pack, pack_levels, packed_bytes, unpack, unpack_levels


def by_bits(values, bits):
    """Eight bits a byte, lowest first, as one long number."""
    number = sum(value << (bits * index) for index, value in enumerate(values))
    return list(number.to_bytes(packed_bytes(len(values), bits), "little"))


@pytest.mark.parametrize(
    ("values", "bits", "packed"),
    [
        ([1, 0, 1, 1, 0, 0, 0, 0, 1], 1, [0b1101, 1]),
        ([1, 2, 3], 4, [0x21, 0x03]),
        ([4, 0, 3, 2], 3, [0b11000100, 0b100]),
        ([255, 1], 8, [255, 1]),
        ([0x1FF, 0x100, 0x001], 9, [0xFF, 0x00, 0x01, 0b011]),  # low bytes, then the ninth bits
        ([0, 0], 0, []),
        ([], 5, []),
    ],
)
def test_packing_by_hand(values, bits, packed):
    assert pack(torch.tensor(values, dtype=torch.int64), bits).tolist() == packed
    assert unpack(torch.tensor(packed, dtype=torch.uint8), len(values), bits, "x").tolist() == values


@given(bits=st.integers(0, 8), data=st.data())
@settings(deadline=None)
def test_up_to_eight_bits_lie_as_in_one_long_number(bits, data):
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=40))
    assert pack(torch.tensor(values, dtype=torch.int64), bits).tolist() == by_bits(values, bits)


@given(bits=st.integers(0, 40), data=st.data())
@settings(deadline=None)
def test_what_was_packed_is_unpacked(bits, data):
    values = torch.tensor(data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=40)), dtype=torch.int64)
    packed = pack(values, bits)
    assert len(packed) == packed_bytes(len(values), bits)
    assert torch.equal(unpack(packed, len(values), bits, "x").long(), values)


@pytest.mark.parametrize("bits", [1, 3, 4, 7])
def test_the_chunk_does_not_matter(bits, monkeypatch):
    values = torch.randint(1 << bits, (1003,), generator=torch.Generator().manual_seed(bits))
    packed = pack(values, bits)
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", 64)
    assert torch.equal(pack(values, bits), packed)
    assert torch.equal(unpack(packed, 1003, bits, "x").long(), values)


@given(bits=st.integers(1, 20), count=st.integers(0, 20), data=st.data())
@settings(deadline=None)
def test_bytes_that_are_accepted_are_those_that_packing_gives(bits, count, data):
    size = packed_bytes(count, bits)
    packed = torch.tensor(list(data.draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    try:
        values = unpack(packed, count, bits, "x")
    except ArtifactError:
        return
    assert torch.equal(pack(values.long(), bits), packed)


@pytest.mark.parametrize("packed", [torch.zeros(1), torch.zeros(2, dtype=torch.int8), torch.zeros(1, 2)])
def test_other_lengths_and_types_are_refused(packed):
    with pytest.raises(ArtifactError, match=r"x is .*; 3 values of 4 bits take 2 bytes"):
        unpack(packed, 3, 4, "x")


@pytest.mark.parametrize("most", [0, 1, 2, 3, 4, 7, 8, 100, 255, 256, 300, 65535])
def test_levels_come_back_in_the_fewest_bits(most):
    dtype = torch.uint8 if most <= 255 else torch.uint16
    levels = (torch.arange(35) * 7919 % (most + 1)).to(dtype).view(5, 7)
    packed = pack_levels(levels, most)
    bits = next(bits for bits in range(17) if 2**bits >= most + 1)
    assert packed.numel() == -(-35 * bits // 8)
    found = unpack_levels(packed, levels.shape, most, "the conflict")
    assert (found.dtype, found.shape) == (dtype, levels.shape)
    assert torch.equal(found.int(), levels.int())


def test_levels_without_values_or_shape():
    assert unpack_levels(pack_levels(torch.zeros(0, 3), 4), torch.Size((0, 3)), 4, "x").shape == (0, 3)
    assert unpack_levels(pack_levels(torch.tensor(3), 4), torch.Size(()), 4, "x") == 3


def test_levels_beyond_the_most_are_refused():
    with pytest.raises(ArtifactError, match="x holds the level 7, the most is 4"):
        unpack_levels(pack_levels(torch.tensor([7]), 7), torch.Size((1,)), 4, "x")
    with pytest.raises(ArtifactError, match=r"x: a bit beyond the last value is set"):
        unpack_levels(torch.tensor([0b1000], dtype=torch.uint8), torch.Size((1,)), 4, "x")
    with pytest.raises(AssertionError, match=r"between 0 and 5, not in 0 \.\.\. 4"):
        pack_levels(torch.tensor([0, 5]), 4)
