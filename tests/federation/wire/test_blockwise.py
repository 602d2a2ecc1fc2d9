import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.errors import ArtifactError
from fedproxy.federation.wire import blockwise as module
from fedproxy.federation.wire.blockwise import blockwise
from fedproxy.splitmix64 import splitmix64

LARGEST = torch.finfo(torch.float32).max


def decoded(code, parts, count):
    return code.decode(parts, count, "bank: w")


def test_four_bits_by_hand():
    code = blockwise(4, 32)
    parts = code.encode(torch.tensor([7.0, -3.0, 0.0, 1.0, -7.0] + [0.0] * 27 + [-0.5]), 0)
    assert parts["scales"].tolist() == [1.0, 0.07177734375]  # 0.5 / 7 = 0.0714285..., rounded up to eight bits
    codes = parts["codes"].tolist()
    assert codes[:3] == [14 | 4 << 4, 7 | 8 << 4, 0 | 7 << 4]
    assert codes[3:16] == [7 | 7 << 4] * 13
    assert codes[16] in (0, 1)  # -0.5 / 0.0717... = -6.97, so -7 or -6, and no second value in the byte
    assert decoded(code, parts, 33)[:5].tolist() == [7.0, -3.0, 0.0, 1.0, -7.0]
    assert decoded(code, parts, 33)[32] == (codes[16] - 7) * 0.07177734375


def test_rounding_follows_the_published_draws():
    values = torch.randn(301, generator=torch.Generator().manual_seed(0))
    values[:2] = torch.tensor([127.0, -126.5])
    parts = blockwise(8, 32).encode(values, 99)
    words = [word % (1 << 64) for word in splitmix64(99, torch.arange(151)).tolist()]
    for index, value in enumerate(values.tolist()):
        scaled = value / float(parts["scales"][index // 32])
        half = words[index // 2] >> (32 * (index % 2)) & 0xFFFFFFFF
        uniform = ((half >> 9) + 0.5) / (1 << 23)
        assert abs(uniform - scaled % 1) < 1e-6 or parts["codes"][index] == math.floor(scaled) + (uniform < scaled % 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_chunk_does_not_matter(bits, monkeypatch):
    values = torch.randn(5001, generator=torch.Generator().manual_seed(1))
    whole = blockwise(bits, 128).encode(values, 5)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 256)
    pieces = blockwise(bits, 128).encode(values, 5)
    assert all(torch.equal(whole[part], pieces[part]) for part in whole)


@pytest.mark.parametrize("bits", [4, 8])
def test_multiples_of_the_step_come_back_exactly_for_every_key(bits):
    levels = 2 ** (bits - 1) - 1
    values = torch.arange(-levels, levels + 1) * 0.375
    code = blockwise(bits, 256)
    for key in range(50):
        assert torch.equal(decoded(code, code.encode(values, key), len(values)), values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.3, -0.01, 0.5001, -0.9999, 1e-5])
def test_the_mean_over_many_values_is_the_value(bits, value):
    count = 200_000
    values = torch.full((count,), value)
    values[::32] = 1.0  # so that the step is another than the value's own
    step = float(blockwise(bits, 32).encode(values, 0)["scales"][0])
    found = decoded(blockwise(bits, 32), blockwise(bits, 32).encode(values, 3), count)
    rest = found[torch.arange(count) % 32 != 0].double()
    up = value / step % 1
    deviation = step * math.sqrt(up * (1 - up) / len(rest))
    assert abs(float(rest.mean()) - value) <= 5 * deviation + step * 2**-17


def test_neighbouring_draws_are_uncorrelated():
    values = torch.full((200_000,), 0.5)
    values[::32] = 7.0
    up = decoded(blockwise(4, 32), blockwise(4, 32).encode(values, 1), len(values)) - 0.5
    for lag in (1, 2, 3, 16):
        pairs = (up[lag:] * up[:-lag])[torch.arange(len(up) - lag) % 32 != 0]
        rest = pairs[pairs.abs() < 1]
        assert abs(float(rest.mean())) / 0.25 < 5 / math.sqrt(len(rest))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("largest", [LARGEST, 3.39e38, 1e30, 1.0, 1e-30, 1.1754944e-38, 1e-38, 1e-40, 1e-45])
def test_steps_are_finite_cover_the_largest_value_and_are_no_coarser_than_they_must(bits, largest):
    levels = 2 ** (bits - 1) - 1
    parts = blockwise(bits, 32).encode(torch.tensor([largest, -largest / 3]), 0)
    step = float(parts["scales"][0])
    assert 0 < step * levels <= LARGEST
    assert step * levels * (1 + 2**-24) >= largest or largest > 3.38e38
    assert step <= largest / levels * (1 + 2**-7) + 2.0**-133
    found = decoded(blockwise(bits, 32), parts, 2).double()
    assert ((found - torch.tensor([largest, -largest / 3]).double()).abs() <= step * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", [4, 8])
@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=70),
    key=st.integers(0, (1 << 63) - 1),
)
@settings(deadline=None)
def test_no_value_is_off_by_more_than_its_blocks_step(bits, values, key):
    code, exact = blockwise(bits, 32), torch.tensor(values, dtype=torch.float64)
    parts = code.encode(exact.float(), key)
    found = decoded(code, parts, len(values)).double()
    steps = parts["scales"].double().repeat_interleave(32)[: len(values)]
    assert found.isfinite().all()
    assert ((found - exact).abs() <= steps * (1 + 1e-6)).all()


def test_a_block_of_zeros_has_no_step():
    code = blockwise(8, 32)
    parts = code.encode(torch.cat([torch.zeros(32), torch.ones(1)]), 0)
    assert parts["scales"][0] == 0
    assert not decoded(code, parts, 33)[:32].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf, -math.inf, 3e38])
def test_impossible_scales_are_refused(bits, scale):
    code = blockwise(bits, 32)
    parts = code.encode(torch.ones(40), 0)
    parts["scales"][1] = scale
    with pytest.raises(ArtifactError, match="bank: w has a scale that is NaN, negative, or above"):
        decoded(code, parts, 40)


def test_codes_that_are_not_used_are_refused():
    eight, four = blockwise(8, 32), blockwise(4, 32)
    parts = eight.encode(torch.ones(3), 0)
    parts["codes"][2] = -128
    with pytest.raises(ArtifactError, match="bank: w has a code beyond ±127"):
        decoded(eight, parts, 3)
    parts = four.encode(torch.ones(3), 0)
    parts["codes"][0] = 0xF7
    with pytest.raises(ArtifactError, match="bank: w has a code beyond ±7"):
        decoded(four, parts, 3)
    parts["codes"][:] = torch.tensor([0x77, 0x17])
    with pytest.raises(ArtifactError, match="bank: w: a bit beyond the last value is set"):
        decoded(four, parts, 3)
