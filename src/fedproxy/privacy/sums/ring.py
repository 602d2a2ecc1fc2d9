"""Vectors of words modulo 2^32, and the keystreams that mask them: addition wraps, so a uniform mask hides all."""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

WORD = np.dtype("<u4")
KEY_BYTES = 32
_PIECE = 1 << 16
"""So many words of keystream are made at once: what they take stays in a processor's cache."""
_NONCE = bytes(16)
"""Always the same: every key masks one vector only."""
_MOST_WORDS = 1 << 34
"""The keystream's blocks of 16 words are counted in 32 bits."""


def add_mask(words: np.ndarray, key: bytes, *, subtract: bool = False) -> None:
    """Add the keystream of a key to words, in place: words_k ± ChaCha20(key)_k mod 2^32 (RFC 8439).

    Args:
        words: Words, uint32 [k].
        key: 32 bytes, used for this one vector only.
        subtract: Take the mask away instead.
    """
    stream = Cipher(ChaCha20(key, _NONCE), mode=None).encryptor()
    zeros = bytes(WORD.itemsize * min(_PIECE, len(words)))
    piece = bytearray(len(zeros))
    for begin in range(0, len(words), _PIECE):
        part = words[begin : begin + _PIECE]
        size = WORD.itemsize * len(part)
        stream.update_into(memoryview(zeros)[:size], piece)
        mask = np.frombuffer(piece, WORD, len(part))
        (np.subtract if subtract else np.add)(part, mask, out=part)


def check_words(words: object) -> np.ndarray:
    """Words as they may be summed.

    Raises:
        ValueError: they are no vector of uint32, or too long for one keystream.
    """
    if not isinstance(words, np.ndarray) or words.dtype != WORD or words.ndim != 1:
        raise ValueError("the words are no vector of uint32")
    if len(words) > _MOST_WORDS:
        raise ValueError(f"{len(words)} words are more than one keystream has, {_MOST_WORDS}")
    return words
