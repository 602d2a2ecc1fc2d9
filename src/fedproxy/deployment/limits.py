"""What one address or key may take in some time: token buckets, and places that are held; in bounded memory."""

import ipaddress
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

MOST_KNOWN = 10_000
"""So many addresses or keys have a bucket; beyond, the one that was idle for longest begins anew."""


class Allowance:
    """A token bucket for each of many: so much at once, and so much a second.

    Args:
        burst: What a full bucket holds; who was never here has one.
        per_second: What flows into it.
        most: How many buckets are kept.
        clock: Seconds, rising.
    """

    def __init__(
        self, burst: float, per_second: float, most: int = MOST_KNOWN, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst, self._per_second, self._most, self._clock = burst, per_second, most, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, who: str, amount: float = 1.0) -> float:
        """Take from a bucket what is in it, all or nothing.

        Returns:
            0.0 if it was taken; else nothing was, and after so many seconds it could be. Infinity for more than a
            bucket holds.
        """
        with self._lock:
            now = self._clock()
            there, since = self._buckets.pop(who, (self._burst, now))
            there = min(self._burst, there + (now - since) * self._per_second)
            taken = amount <= there
            self._buckets[who] = (there - amount if taken else there, now)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
            if taken:
                return 0.0
            return (amount - there) / self._per_second if amount <= self._burst else math.inf


class Places:
    """So many places for each of many at one time.

    Args:
        each: The places of each.
    """

    def __init__(self, each: int) -> None:
        self._each, self._lock = each, threading.Lock()
        self._held: Counter[str] = Counter()

    def enter(self, who: str) -> bool:
        """Take a place, unless all are taken; whoever has one gives it back by `leave`."""
        with self._lock:
            if self._held[who] >= self._each:
                return False
            self._held[who] += 1
            return True

    def leave(self, who: str) -> None:
        """Give a place back."""
        with self._lock:
            self._held[who] -= 1
            if not self._held[who]:
                del self._held[who]


def neighbourhood(address: str) -> str:
    """What counts as one address: an IPv4 address, or the 64 bits of an IPv6 address that name a network.

    Example:
        >>> neighbourhood("2001:db8::1") == neighbourhood("2001:db8::ffff:2")
        True
        >>> neighbourhood("::ffff:192.0.2.7")
        '192.0.2.7'
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((int(found) >> 64 << 64, 64)))
