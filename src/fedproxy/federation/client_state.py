"""What a client remembers from round to round: what its wire lost, and what its regulariser carries.

The state that a round ends with is a file, and so is that of the last round whose update counted: the server's order
says which that was. So what a reply moved that was refused, late or lost is forgotten, and a round that is repeated, by
a resumed server or for want of a quorum, ends in the same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fedproxy.artifacts import os_error
from fedproxy.tensor_files import load_tensors, save_tensors
from fedproxy.tensors import Tensors

_RESIDUAL, _STATE = "residual/", "regulariser/"


@dataclass(frozen=True)
class Memory:
    """A client's state.

    Attributes:
        residual: What error feedback carries over; none before the first lossy update.
        state: The client's own state of its regulariser; none before the first round, and without one.
    """

    residual: Tensors | None = None
    state: Tensors | None = None


class ClientState:
    """The state of one client in one run.

    Args:
        folder: Where it is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _of(self, number: int) -> Path:
        """The file of the state that round `number` ends with, named after the round that follows."""
        return self._folder / f"{number + 1:04d}.safetensors"

    def before(self, since: int) -> Memory:
        """The state that a round begins with: what is kept of round `since`, nothing for 0.

        Raises:
            ArtifactError: it is damaged.
        """
        if not since or not self._of(since).exists():
            return Memory()
        tensors = load_tensors(self._of(since))
        return Memory(_under(_RESIDUAL, tensors), _under(_STATE, tensors))

    def after(self, number: int, since: int, memory: Memory) -> None:
        """Keep the state that round `number` ends with, beside that of round `since`, with which it began.

        What else there is of rounds before is removed.

        Raises:
            ResourceError: the disk is full; what was there stays.
        """
        parts = ((_RESIDUAL, memory.residual), (_STATE, memory.state))
        tensors = {prefix + name: tensor for prefix, held in parts for name, tensor in (held or {}).items()}
        if not tensors:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self._of(number), tensors)
            for path in self._folder.glob("*.safetensors"):
                if path.stem.isdecimal() and int(path.stem) <= number and path != self._of(since):
                    path.unlink()
        except OSError as error:
            raise os_error(error, self._folder) from error


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)} or None
