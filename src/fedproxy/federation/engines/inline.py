"""The inline engine: all clients one after the other in this process, on one proxy whose adapter is swapped."""

import time
from collections.abc import Callable

from fedproxy.federation.coordinator import Closed, Coordinator, Order, Reply


def drive(
    coordinator: Coordinator,
    answer: Callable[[Order, str], Reply],
    on_closed: Callable[[Closed, float], None],
) -> None:
    """Run the rounds that are left.

    Args:
        coordinator: The federation.
        answer: Trains as the named client and returns its reply.
        on_closed: Called with each complete round and the seconds it took; it stores the round before the next begins.

    Raises:
        FederationError: a round has no quorum.
    """
    while not coordinator.done:
        started = time.perf_counter()
        order = coordinator.begin()
        for name in coordinator.clients:
            coordinator.receive(answer(order, name))
        closed = coordinator.close()
        on_closed(closed, time.perf_counter() - started)
