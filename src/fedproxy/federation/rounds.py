"""The one loop over rounds, for every engine: wait for clients, ask, receive, close, store; repeat a round in need."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from fedproxy.config import seconds
from fedproxy.errors import FederationError
from fedproxy.federation.coordinator import Coordinator, QuorumError
from fedproxy.federation.messages import Answer, Closed, Order

POLL_SECONDS = 0.5
"""Pause between two looks at who is there."""


class Exchange(Protocol):
    """Carries orders to clients and answers back; it knows nothing of the method and judges no reply."""

    def available(self) -> Sequence[str]:
        """Names of the clients that can take part now."""
        ...

    def ask(self, orders: Mapping[str, Order], deadline: float | None) -> Iterator[tuple[str, Answer]]:
        """Send each client its order, all of one round and to train or all to score, and yield what comes back.

        It ends when all have answered, or after `deadline` seconds. Late answers to earlier orders may be among them:
        the coordinator refuses those.

        Yields:
            The name of the client that sent it, as the transport knows it, and the answer.
        """
        ...


def drive(
    coordinator: Coordinator,
    exchange: Exchange,
    on_closed: Callable[[Closed, float], None],
    *,
    on_event: Callable[..., None] = lambda name, **values: None,
) -> None:
    """Run the rounds that are left.

    Before its first round it waits up to `patience` for every client that a full round asks, and is then content with
    a quorum; before later rounds it waits for a quorum only. A client that is there and new takes part from then on. A
    round without a quorum is repeated up to `retries` times, where that can change anything
    (`QuorumError.repeatable`). With [federate] validation the clients of a merged round score its adapter, for which
    they have as long as for their training, before it is stored; who does not, costs the round nothing but its score.

    Args:
        coordinator: The federation.
        exchange: The way to its clients.
        on_closed: Called with each complete round and the seconds it took; it stores the round before the next begins.
        on_event: Told what happens, as name and values: `waiting` (round, present, needed), `round_opened` (round,
            asked), `answered` (round, client, fault: none if it counts), `round_failed` (round, reason), `scoring`
            (round, asked), `scored` (round, client, fault), `validated` (round, and what all scores say).

    Raises:
        FederationError: too few clients within `patience`, or a round without a quorum.
    """
    settings = coordinator.settings
    deadline = seconds(settings.deadline) if settings.deadline else None
    full = True
    while not coordinator.done:
        started, tries = time.perf_counter(), 0
        while True:
            available = _wait(coordinator, exchange, full, on_event)
            full = False
            coordinator.begin(available)
            number = coordinator.completed + 1
            on_event("round_opened", round=number, asked=list(coordinator.asked))
            try:
                _ask(coordinator, exchange, deadline, on_event)
                while coordinator.advance():
                    _ask(coordinator, exchange, deadline, on_event)
                closed = coordinator.close()
                break
            except QuorumError as miss:
                on_event("round_failed", round=number, reason=str(miss))
                if tries == settings.retries or not miss.repeatable:
                    raise
                tries += 1
        scoring = coordinator.scoring(closed)
        if scoring is not None:
            if scoring.orders:
                on_event("scoring", round=number, asked=list(scoring.orders))
                for sender, answer in exchange.ask(scoring.orders, deadline):
                    on_event("scored", round=number, client=sender, fault=scoring.receive(sender, answer))
            coordinator.judge(closed, scoring)
            on_event("validated", round=number, **closed.record["validation"])
        on_closed(closed, time.perf_counter() - started)


def _ask(coordinator: Coordinator, exchange: Exchange, deadline: float | None, on_event: Callable[..., None]) -> None:
    """Ask what the open round now asks for, and let the coordinator receive what comes back."""
    number, trains = coordinator.completed + 1, coordinator.trains
    orders = {name: coordinator.order(name) for name in coordinator.asked}
    for sender, answer in exchange.ask(orders, deadline):
        fault = coordinator.receive(sender, answer)
        if trains or fault:
            on_event("answered", round=number, client=sender, fault=fault)


def _wait(coordinator: Coordinator, exchange: Exchange, full: bool, on_event: Callable[..., None]) -> Sequence[str]:
    """Wait for the clients of the next round: for all that it would ask if `full`, else for a quorum.

    Raises:
        FederationError: there is no quorum within `patience`, or too few clients are left that may be asked.
    """
    settings, told = coordinator.settings, None
    until = time.monotonic() + seconds(settings.patience)
    while True:
        available = exchange.available()
        coordinator.admit(available)
        present = coordinator.eligible.intersection(available)
        if len(present) >= (coordinator.target if full else coordinator.least):
            return available
        waited = time.monotonic() >= until
        if waited and len(present) >= coordinator.least:
            return available
        if waited or len(coordinator.eligible) < coordinator.least:
            raise FederationError(coordinator.too_few(present) + f" [federate] patience is {settings.patience}.")
        if present != told:
            on_event("waiting", round=coordinator.completed + 1, present=sorted(present), needed=coordinator.least)
            told = present
        time.sleep(POLL_SECONDS)
