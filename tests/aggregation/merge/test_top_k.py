import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproxy.aggregation.merge.top_k import kept_count, magnitude_bits, thresholds, trimmed
from tests.aggregation.merge.merge_oracle import flat, trim


def selected(vectors, keep, elements=1 << 18):
    limits = thresholds(vectors, keep, elements)
    return torch.cat([values.clone() for _, values in trimmed(vectors, limits, elements)], dim=1).double().numpy()


def assert_equals_a_stable_sort(vectors, keep, elements=1 << 18):
    expected = np.stack([trim(flat(vector), count) for vector, count in zip(vectors, keep, strict=True)])
    assert np.array_equal(selected(vectors, keep, elements), expected)


@pytest.mark.parametrize(
    ("share", "parameters", "count"),
    [(0.8, 10, 8), (0.3, 10, 3), (0.29, 100, 29), (0.57, 100, 57), (0.3 - 0.1, 10, 2), (1.0, 7, 7), (0.0, 7, 0)],
)
def test_the_count_is_exact_in_decimal(share, parameters, count):
    assert kept_count(share, parameters) == count


@given(percent=st.integers(0, 1000), parameters=st.integers(1, 10**9))
def test_the_count_never_suffers_from_floats(percent, parameters):
    assert kept_count(percent / 1000, parameters) == math.floor(Fraction(percent, 1000) * parameters)


@given(parameters=st.integers(1, 10**6), data=st.data())
def test_the_count_forgives_the_rounding_of_a_share(parameters, data):
    count = data.draw(st.integers(0, parameters))
    share = count / parameters
    for rounded in (share, math.nextafter(share, 0.0), 1.0 - (1.0 - share)):
        assert kept_count(rounded, parameters) == count


@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=2, max_size=2))
def test_bits_order_like_magnitudes(values):
    first, second = torch.tensor(values)
    bits = magnitude_bits(torch.stack([first, second]))
    assert (bits[0] < bits[1]) == (first.abs() < second.abs())
    assert (bits[0] == bits[1]) == (first.abs() == second.abs())


@given(
    rows=st.integers(1, 24).flatmap(
        lambda length: st.lists(
            st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1e-45, 1.0, 2.0]), min_size=length, max_size=length),
            min_size=1,
            max_size=3,
        )
    ),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_ties_go_to_the_lower_index_for_any_chunk_size(rows, data):
    length = len(rows[0])
    keep = [data.draw(st.integers(0, length)) for _ in rows]
    elements = data.draw(st.integers(1, 80))
    cut = data.draw(st.integers(0, length))
    vectors = [{"b": torch.tensor(row[:cut]), "c": torch.tensor(row[cut:])} for row in rows]
    assert_equals_a_stable_sort(vectors, keep, elements)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [0, 1, 500, 4999, 5000])
def test_exactly_the_largest_of_a_random_vector_are_kept(dtype, keep):
    generator = torch.Generator().manual_seed(keep)
    vectors = [{"w": torch.randn(50, 100, generator=generator).to(dtype)} for _ in range(2)]
    assert_equals_a_stable_sort(vectors, [keep, 5000 - keep], elements=1024)
    assert np.count_nonzero(selected(vectors, [keep, 0])[0]) == keep


def test_extreme_magnitudes_are_ordered():
    row = [3.4e38, -1e-45, 1.0, 1.0000001, -1.0000001, 0.0, -0.0, 1.1754944e-38, 65504.0]
    for keep in range(len(row) + 1):
        assert_equals_a_stable_sort([{"w": torch.tensor(row)}], [keep])
    wide = torch.tensor([1e-300, 1.0, 1.0 + 2**-52, -1e300], dtype=torch.float64)
    for keep in range(5):
        assert_equals_a_stable_sort([{"w": wide}], [keep])
