import numpy as np
import pytest

from fedproxy.privacy.sums.ring import add_mask, check_words

BLOCKS = (
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
)
"""RFC 8439, appendix A.1, test vector 1: the first 64 bytes of the keystream of the key and the nonce that are zero."""


def masked(words, key, **how):
    found = words.copy()
    add_mask(found, key, **how)
    return found


def test_the_mask_is_the_keystream_of_the_standard():
    assert masked(np.zeros(16, np.uint32), bytes(32)).tobytes().hex() == BLOCKS


def test_addition_wraps():
    first = int.from_bytes(bytes.fromhex(BLOCKS[:8]), "little")
    assert masked(np.array([2**32 - 1], np.uint32), bytes(32))[0] == first - 1


@pytest.mark.parametrize("count", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_a_mask_can_be_taken_away_at_any_length(count):
    words = np.random.default_rng(0).integers(0, 2**32, count, np.uint32)
    hidden = masked(words, b"k" * 32)
    assert (hidden != words).sum() >= 0.99 * count
    assert np.array_equal(masked(hidden, b"k" * 32, subtract=True), words)


def test_a_longer_keystream_begins_like_a_shorter_one_and_never_repeats():
    long = masked(np.zeros(200_000, np.uint32), b"k" * 32)
    assert np.array_equal(long[:70_000], masked(np.zeros(70_000, np.uint32), b"k" * 32))
    assert not np.array_equal(long[:65_536], long[65_536:131_072])


@pytest.mark.parametrize("words", [[1], np.zeros(2), np.zeros(2, np.int32), np.zeros((1, 2), np.uint32), None])
def test_what_is_no_vector_of_words_is_refused(words):
    with pytest.raises(ValueError, match="uint32"):
        check_words(words)


def test_more_words_than_a_keystream_has_are_refused():
    check_words(np.broadcast_to(np.uint32(0), 1 << 34))
    with pytest.raises(ValueError, match="keystream"):
        check_words(np.broadcast_to(np.uint32(0), (1 << 34) + 1))
