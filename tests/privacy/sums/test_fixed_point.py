import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedproxy.errors import ArtifactError, UsageError
from fedproxy.privacy.randomness import Randomness
from fedproxy.privacy.sums.fixed_point import packed_counts, quantised, restored, unpacked_counts, value_bits


@pytest.mark.parametrize(("members", "bits"), [(1, 32), (2, 31), (3, 30), (4, 30), (5, 29), (100, 25), (2**30, 2)])
def test_the_bits_of_a_value_by_hand(members, bits):
    assert value_bits(members) == bits


@pytest.mark.parametrize("members", [-1, 0, 2**30 + 1])
def test_an_impossible_number_of_members_is_refused(members):
    with pytest.raises(UsageError):
        value_bits(members)


def test_whole_multiples_of_the_step_by_hand():
    """Four bits have the levels -7…7: with the bound 3.5 the step is a half."""
    words = quantised(np.array([0.0, 0.5, 3.5, -0.5, -3.5, 99.0, -99.0]), 3.5, 4, Randomness(0))
    assert words.tolist() == [0, 1, 7, 2**32 - 1, 2**32 - 7, 7, 2**32 - 7]
    assert restored(words, 3.5, 4).tolist() == [0, 0.5, 3.5, -0.5, -3.5, 3.5, -3.5]


@given(arrays(np.float64, 20, elements=st.floats(-2, 2)), st.integers(2, 32), st.floats(1e-6, 1e6))
def test_a_value_is_rounded_to_one_of_its_neighbours(values, bits, bound):
    step = bound / (2 ** (bits - 1) - 1)
    found = restored(quantised(values * bound, bound, bits, Randomness(0)), bound, bits)
    assert np.abs(found - np.clip(values, -1, 1) * bound).max() <= step * (1 + 1e-6)


@pytest.mark.parametrize("value", [0.3, -0.3, 0.75, -2.6])
def test_rounding_is_right_on_average(value):
    """The mean of 200,000 roundings has a standard deviation of at most 0.5 / sqrt(200,000) = 0.0011."""
    found = restored(quantised(np.full(200_000, value), 7.0, 4, Randomness(1)), 7.0, 4)
    assert set(found) == {np.floor(value), np.ceil(value)}
    assert found.mean() == pytest.approx(value, abs=0.007)


@pytest.mark.parametrize("members", [2, 3, 8, 100])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_sum_of_the_largest_values_does_not_wrap(members, sign):
    bits = value_bits(members)
    words = quantised(np.array([sign * 0.1]), 0.1, bits, Randomness(0))
    assert restored(np.uint32(members) * words, 0.1, bits)[0] == pytest.approx(sign * members * 0.1)


def test_long_vectors_are_rounded_whole():
    values = np.linspace(-1, 1, (1 << 20) + 3, dtype=np.float32)
    assert np.abs(restored(quantised(values, 1.0, 30, Randomness(0)), 1.0, 30) - values).max() < 2e-9


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(wrong):
    with pytest.raises(ArtifactError):
        quantised(np.array([0.0, wrong]), 1.0, 16, Randomness(0))


@pytest.mark.parametrize(("bound", "bits"), [(0.0, 8), (-1.0, 8), (np.inf, 8), (np.nan, 8), (1.0, 1), (1.0, 33)])
def test_impossible_bounds_and_bits_are_refused(bound, bits):
    with pytest.raises(UsageError):
        quantised(np.zeros(1), bound, bits, Randomness(0))
    with pytest.raises(UsageError):
        restored(np.zeros(1, np.uint32), bound, bits)


def test_counters_by_hand():
    """Up to three members: fields of two bits. The words of two members, 0b0101 and 0b0100, add up to 0b1001."""
    one = packed_counts([np.array([1]), np.array([1])], 3)
    two = packed_counts([np.array([0]), np.array([1])], 3)
    assert (one.tolist(), two.tolist()) == ([0b0101], [0b0100])
    assert [count.tolist() for count in unpacked_counts(one + two, 2, 3)] == [[1], [2]]


@given(st.data(), st.integers(1, 100))
def test_counters_never_spill_over(data, members):
    fields = data.draw(st.integers(1, 32 // members.bit_length()))
    columns = [
        [data.draw(arrays(np.bool_, 3, elements=st.booleans())) for _ in range(fields)] for _ in range(min(members, 5))
    ]
    full = members - len(columns)  # the other members count everywhere
    words = sum(packed_counts(each, members) for each in columns)
    words += np.uint32(full) * packed_counts([np.ones(3)] * fields, members)
    expected = np.sum(columns, 0) + full
    assert np.array_equal(unpacked_counts(words.astype(np.uint32), fields, members), expected)


def test_counters_that_do_not_fit_and_columns_of_something_else_are_refused():
    with pytest.raises(UsageError, match="32 bits"):
        packed_counts([np.zeros(1)] * 5, 100)
    with pytest.raises(UsageError, match="32 bits"):
        unpacked_counts(np.zeros(1, np.uint32), 5, 100)
    with pytest.raises(UsageError, match="column 1"):
        packed_counts([np.zeros(1), np.array([2])], 3)
