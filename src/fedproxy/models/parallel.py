"""Several processes of one client on one machine, begun by accelerate's or torch's launcher (a GPU each).

One leads: it runs the command as if alone. The others load what it loads and compute their share of every step. Between
steps they wait, without limit; when the leader's process ends, however it ends, they end too: each keeps a connection
open to it, and ends when that closes.
"""

import contextlib
import os
import signal
import socket
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed

from fedproxy.config import Train
from fedproxy.errors import FedproxyError, ResourceError
from fedproxy.models.encoding import Encoded
from fedproxy.models.gradients import Backward
from fedproxy.models.lora import AdaptedModel, adapter_parameters

LEADER = 0
_WITHOUT_LIMIT = timedelta(days=365)
_HERE = "127.0.0.1"
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells its processes; ours must not tell it to theirs."""


@dataclass(frozen=True)
class Load:
    """Order to load a model, with the arguments of `load_trainable`."""

    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Begin:
    """Order to make the model ready for a training.

    Attributes:
        settings: The [train] table.
        pad: Padding token id.
        seed: Seed of dropout.
        trained: Names of the adapter tensors that are trained.
    """

    settings: Train
    pad: int
    seed: int
    trained: frozenset[str]


@dataclass(frozen=True)
class Step:
    """Order to compute the gradients of a share of a step.

    Attributes:
        batches: The share.
        count: Tokens that count in the whole step.
    """

    batches: list[list[Encoded]]
    count: int


@dataclass(frozen=True)
class End:
    """Order to end the training."""


Order = Load | Begin | Step | End


@dataclass
class Team:
    """The processes, seen from one of them.

    Attributes:
        rank: The number of this one; 0 leads.
        size: How many there are.
        device: Where this one computes.
        control: Their group for orders, on the CPU.
        lines: The leader's connections to the others, or the connection to the leader; open while the process lives.
    """

    rank: int
    size: int
    device: torch.device
    control: Any
    lines: list[socket.socket] = field(default_factory=list)
    _loaded: Any = None

    def give(self, orders: Sequence[Order]) -> None:
        """Give every process its order (the leader's own is ignored)."""
        distributed.scatter_object_list([None], list(orders), LEADER, group=self.control)

    def take(self) -> Order:
        """Wait for this process's order."""
        found: list[Any] = [None]
        distributed.scatter_object_list(found, None, LEADER, group=self.control)
        order: Order = found[0]
        return order

    def agree(self, loss: float, error: str | None) -> float:
        """Tell all what went well here.

        Returns:
            The sum of all losses.

        Raises:
            ResourceError: something failed somewhere; all processes raise it.
        """
        said: list[Any] = [None] * self.size
        distributed.all_gather_object(said, (loss, error), group=self.control)
        failed = {rank: words for rank, (_, words) in enumerate(said) if words is not None}
        if failed:
            raise ResourceError("; ".join(f"process {rank} of {self.size}: {words}" for rank, words in failed.items()))
        return float(sum(part for part, _ in said))

    def spread(self, model: AdaptedModel) -> None:
        """Overwrite the adapter of every process by the leader's."""
        values = [parameter.data for _, parameter in sorted(adapter_parameters(model).items())]
        flat = torch.cat([value.flatten() for value in values])
        distributed.broadcast(flat, LEADER)
        for value, part in zip(values, torch.split(flat, [value.numel() for value in values]), strict=True):
            value.copy_(part.view_as(value))

    def add_up(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Sum the gradients of all processes in the leader; the others' are dropped."""
        ordered = [parameter for _, parameter in sorted(parameters.items())]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in ordered]
        flat = torch.cat([grad.flatten() for grad in grads])
        distributed.reduce(flat, LEADER)
        for parameter, part in zip(ordered, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
            parameter.grad = part.view_as(parameter) if self.rank == LEADER else None

    def loaded(self, model: AdaptedModel | None, error: str | None) -> None:
        """Say that this process has loaded its model, or why not, and wait for the others.

        Raises:
            ResourceError: a process could not load it.
        """
        self._loaded = None
        self.agree(0.0, error)
        self._loaded = None if model is None else weakref.ref(model)

    def has(self, model: AdaptedModel) -> bool:
        """Whether `model` is what all processes loaded last."""
        return self._loaded is not None and self._loaded() is model


_team: Team | None = None


def team() -> Team | None:
    """The team that this process leads; none in a process that was launched alone."""
    return _team


def form() -> Team:
    """Form the team of the launched processes; all of them call this."""
    global _team
    state = PartialState(cpu=not torch.cuda.is_available())
    control = distributed.new_group(backend="gloo", timeout=_WITHOUT_LIMIT)
    formed = Team(state.process_index, state.num_processes, state.device, control)
    place: list[Any] = [None]
    if formed.rank == LEADER:
        with socket.create_server((_HERE, 0), backlog=formed.size) as server:
            place = [server.getsockname()[1]]
            distributed.broadcast_object_list(place, LEADER, group=control)
            formed.lines = [server.accept()[0] for _ in range(formed.size - 1)]
        for name in _LAUNCHERS:
            os.environ.pop(name, None)
        _team = formed
        return formed
    distributed.broadcast_object_list(place, LEADER, group=control)
    formed.lines = [socket.create_connection((_HERE, place[0]))]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader decides what Ctrl-C means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(formed.lines[0],), daemon=True).start()
    return formed


def dissolve() -> None:
    """Let the other processes end; this one goes on alone."""
    global _team
    for line in _team.lines if _team else ():
        line.close()
    _team = None


def _end_with(line: socket.socket) -> None:
    """End this process, whatever it waits for, when the leader's ends."""
    with contextlib.suppress(OSError):
        line.recv(1)
    os._exit(0)


def shares(batch: Sequence[Encoded], count: int) -> list[list[Encoded]]:
    """Share out a batch so that all get about as many tokens: the longest first, each to who has the fewest."""
    given: list[list[Encoded]] = [[] for _ in range(count)]
    tokens = [0] * count
    for example in sorted(batch, key=lambda example: -len(example.ids)):
        least = tokens.index(min(tokens))
        given[least].append(example)
        tokens[least] += len(example.ids)
    return given


def compute_share(
    team: Team, model: AdaptedModel, parameters: Mapping[str, torch.Tensor], step: Step, alone: Backward
) -> float:
    """Compute this process's share of a step; the leader's parameters get the gradients of all.

    Returns:
        The loss of the whole step.

    Raises:
        ResourceError: a process failed.
    """
    team.spread(model)
    loss, error = 0.0, None
    try:
        loss = alone(step.batches, step.count)
    except RuntimeError as failed:  # out of memory, above all
        error = f"{type(failed).__name__}: {failed}"
    total = team.agree(loss, error)
    team.add_up(parameters)
    return total


@contextlib.contextmanager
def together(model: AdaptedModel, settings: Train, pad: int, seed: int, alone: Backward) -> Iterator[Backward]:
    """Compute the gradients of steps with the whole team; with `alone`, if there is none that has loaded `model`.

    The other arguments are as of `train`; each process's dropout has a seed of its own.
    """
    leading = team()
    if leading is None or not leading.has(model):
        yield alone
        return
    parameters = {name: p for name, p in adapter_parameters(model).items() if p.requires_grad}

    def backward(batches: Sequence[Sequence[Encoded]], count: int) -> float:
        parts = [shares(batch, leading.size) for batch in batches]
        steps = [Step([part[rank] for part in parts if part[rank]], count) for rank in range(leading.size)]
        leading.give(steps)
        return compute_share(leading, model, parameters, steps[LEADER], alone)

    leading.give([Begin(settings, pad, seed, frozenset(parameters))] * leading.size)
    try:
        yield backward
    except FedproxyError:  # between steps
        leading.give([End()] * leading.size)
        raise
    except BaseException:  # anywhere: the others may wait for what does not come
        dissolve()
        raise
    leading.give([End()] * leading.size)
