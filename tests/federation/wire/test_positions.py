import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.errors import ArtifactError
from fedproxy.federation.wire.positions import (
    decode_positions,
    encode_positions,
    most_position_bytes,
    position_bytes,
)


def mask(total, positions):
    kept = torch.zeros(total, dtype=torch.bool)
    kept[positions] = True
    return kept


@pytest.mark.parametrize(
    ("total", "positions", "packed"),
    [
        # Four low bits of each: 2, 3, 8; high parts 0, 0, 2, so the bits 0, 1 and 4 are set.
        (64, [2, 3, 40], [0x32, 0x08, 0b10011]),
        (64, sorted({*range(64)} - {2, 3, 40}), [0x32, 0x08, 0b10011]),  # the dropped ones are rarer
        (16, [0, 1, 9], [0b11, 0b10]),  # a bitmap is no longer
        (16, list(range(16)), []),
        (16, [], []),
        (0, [], []),
        (1, [0], []),
    ],
)
def test_positions_by_hand(total, positions, packed):
    assert encode_positions(mask(total, positions)).tolist() == packed
    assert position_bytes(len(positions), total) == len(packed)
    found = decode_positions(torch.tensor(packed, dtype=torch.uint8), len(positions), total, "x")
    assert found.tolist() == positions


@given(kept=st.lists(st.booleans(), max_size=300), rare=st.integers(1, 20))
@settings(deadline=None)
def test_positions_come_back_and_take_the_bytes_foretold(kept, rare):
    kept = torch.tensor(kept, dtype=torch.bool) & (torch.arange(len(kept)) % rare == 0)
    packed, count = encode_positions(kept), int(kept.sum())
    assert len(packed) == position_bytes(count, len(kept)) <= -(-len(kept) // 8)
    assert torch.equal(decode_positions(packed, count, len(kept), "x"), kept.nonzero().view(-1))


@pytest.mark.parametrize("share", [1e-4, 0.003, 0.01, 0.1, 0.2, 0.5, 0.8, 0.97, 0.9999])
def test_a_position_takes_less_than_a_bit_more_than_its_entropy(share):
    total = 1_000_000
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    spent = 8 * position_bytes(int(share * total), total)
    assert entropy * total <= spent <= entropy * total + 0.7 * min(share, 1 - share) * total + 16


@given(data=st.data(), total=st.integers(0, 200))
@settings(deadline=None)
def test_bytes_that_are_accepted_are_those_that_encoding_gives(data, total):
    count = data.draw(st.integers(0, total))
    size = position_bytes(count, total)
    kept = mask(total, torch.randperm(total, generator=torch.Generator().manual_seed(count))[:count])
    raw = encode_positions(kept)
    for _ in range(data.draw(st.integers(1, 3)) if size else 0):
        raw[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = decode_positions(raw, count, total, "x")
    except ArtifactError:
        return
    assert len(found) == count
    assert torch.equal(encode_positions(mask(total, found)), raw)


@pytest.mark.parametrize(
    ("packed", "match"),
    [
        ([0x33, 0x08, 0b10011], "comes twice"),
        ([0x23, 0x08, 0b10011], "too early"),
        ([0x32, 0x0F, 0b100011], "beyond the last of 60 values"),
        ([0x32, 0x18, 0b10011], "a bit beyond the last value is set"),
        ([0x32, 0x08, 0b1010011], "a bit beyond the last value is set"),
        ([0x32, 0x08, 0b110011], "4 positions are marked, expected 3"),
        ([0x32, 0x08, 0b10001], "2 positions are marked, expected 3"),
        ([0x32, 0x08], "take 1 bytes"),
        ([0x32, 0x08, 0b10011, 0], "take 1 bytes"),
    ],
)
def test_wrong_bytes_are_refused(packed, match):
    with pytest.raises(ArtifactError, match=f"^x.*{match}"):
        decode_positions(torch.tensor(packed, dtype=torch.uint8), 3, 60, "x")


@given(counts=st.lists(st.tuples(st.integers(0, 3000), st.floats(0, 1)), max_size=12))
@settings(deadline=None)
def test_the_bound_holds_however_the_kept_are_spread(counts):
    totals = [total for total, _ in counts]
    kept = [int(share * total) for total, share in counts]
    spent = sum(position_bytes(count, total) for count, total in zip(kept, totals, strict=True))
    assert spent <= most_position_bytes(sum(kept), totals) <= sum(-(-total // 8) for total in totals)
