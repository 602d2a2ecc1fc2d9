"""Shamir's secret sharing of short byte strings: any `threshold` shares give the secret, fewer say nothing of it.

Shamir, "How to share a secret", CACM 1979, over GF(2^128), a block of 16 bytes at a time.
"""

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir

_BLOCK = 16


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Split a secret.

    Args:
        secret: A multiple of 16 bytes.
        threshold: So many shares give the secret again.
        count: So many shares are made.

    Returns:
        Shares as long as the secret; that at place k belongs to point k + 1.
    """
    blocks = [
        Shamir.split(threshold, count, secret[begin : begin + _BLOCK], False) for begin in range(0, len(secret), _BLOCK)
    ]
    return [b"".join(share for _, share in points) for points in zip(*blocks, strict=True)]


def combined(shares: Mapping[int, bytes]) -> bytes:
    """The secret of exactly `threshold` shares, by their points; of shares that do not fit together, any bytes."""
    size = len(next(iter(shares.values())))
    return b"".join(
        Shamir.combine([(point, share[begin : begin + _BLOCK]) for point, share in shares.items()], False)
        for begin in range(0, size, _BLOCK)
    )
