"""The inline engine: all clients one after the other in this process, on one proxy whose adapter is swapped."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from fedproxy.errors import ArtifactError, FedproxyError, ResourceError, UsageError
from fedproxy.federation.messages import Order, Refusal, Reply


class InlineExchange:
    """An `Exchange` whose clients are a function; all are there at any time.

    A reply's own `seconds` are held against the deadline. A training that fails costs the round that client's reply;
    what is wrong with this process or its inputs ends the run.

    Args:
        answer: Trains as the named client and returns its reply.
        names: The clients' names.
    """

    def __init__(self, answer: Callable[[Order, str], Reply], names: Sequence[str]) -> None:
        self._answer, self._names = answer, tuple(names)

    def available(self) -> Sequence[str]:
        """All clients."""
        return self._names

    def ask(self, orders: Mapping[str, Order], deadline: float | None) -> Iterator[tuple[str, Reply | Refusal]]:
        """Train as each of the clients in turn."""
        for name, order in orders.items():
            yield name, self._try(order, name)

    def _try(self, order: Order, name: str) -> Reply | Refusal:
        try:
            return self._answer(order, name)
        except (UsageError, ArtifactError, ResourceError):
            raise
        except FedproxyError as error:
            return Refusal(name, order.round, str(error))
