from itertools import combinations

import pytest

from fedproxy.privacy.sums.shares import combined, split


def block(value):
    return value.to_bytes(16, "big")


def test_a_line_by_hand():
    """The secret 5 on the line 5 + x over GF(2^128), where addition is exclusive or: the shares are 4, 7 and 6."""
    shares = {1: block(4), 2: block(7), 3: block(6)}
    for pair in combinations(shares, 2):
        assert combined({point: shares[point] for point in pair}) == block(5)


@pytest.mark.parametrize("secret", [b"s" * 16, bytes(range(32))])
def test_any_shares_of_the_threshold_give_the_secret_and_fewer_do_not(secret):
    shares = dict(enumerate(split(secret, 3, 5), 1))
    for chosen in combinations(shares, 3):
        assert combined({point: shares[point] for point in chosen}) == secret
    for chosen in combinations(shares, 2):
        assert combined({point: shares[point] for point in chosen}) != secret


def test_shares_are_drawn_anew_each_time():
    assert not set(split(bytes(16), 2, 3)) & set(split(bytes(16), 2, 3))


def test_a_wrong_share_gives_something_else():
    first, second, _ = split(b"s" * 16, 2, 3)
    assert combined({1: first, 2: bytes([second[0] ^ 1]) + second[1:]}) != b"s" * 16
