"""Independent seeds from one seed: every random choice names what it is for."""

import hashlib


def derive_seed(seed: int, *labels: str | int) -> int:
    """Return a 63-bit seed for the purpose that `labels` name, independent of every other purpose.

    Example:
        >>> derive_seed(0, "train", "bank", 3) == derive_seed(0, "train", "bank", 3)
        True
    """
    digest = hashlib.sha256(repr((seed, *labels)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
