import pytest
import torch

from fedproxy.splitmix64 import splitmix64


def test_the_draws_are_those_published_for_splitmix64():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = splitmix64(1234567, torch.arange(5)).tolist()
    assert [value % (1 << 64) for value in found] == published


def plain_splitmix64(key, index):
    mask = (1 << 64) - 1
    state = (key + (index + 1) * 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


@pytest.mark.parametrize("key", [0, 1, (1 << 63) - 1, (1 << 64) - 1])
def test_the_draws_equal_integer_arithmetic_at_any_index(key):
    indices = [0, 1, 1000, 1 << 31, (1 << 40) + 7]
    found = splitmix64(key, torch.tensor(indices)).tolist()
    assert [value % (1 << 64) for value in found] == [plain_splitmix64(key, index) for index in indices]
