"""What a client remembers from round to round: what its wire lost, and SCAFFOLD's own control variate.

The state that a round begins with is a file named after the round. It stays until the next round's is used, so that a
round that is repeated, by a resumed server or for want of a quorum, ends in the same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fedproxy.artifacts import os_error
from fedproxy.tensor_files import load_tensors, save_tensors
from fedproxy.tensors import Tensors

_RESIDUAL, _CONTROL = "residual/", "control/"


@dataclass(frozen=True)
class Memory:
    """A client's state.

    Attributes:
        residual: What error feedback carries over; none before the first lossy update.
        control: c_k of SCAFFOLD; none before the first round with it.
    """

    residual: Tensors | None = None
    control: Tensors | None = None


class ClientState:
    """The state of one client in one run.

    Args:
        folder: Where it is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _rounds(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("[0-9]*.safetensors"))

    def _of(self, number: int) -> Path:
        return self._folder / f"{number:04d}.safetensors"

    def before(self, number: int) -> Memory:
        """The state that round `number` begins with: that after the last round that the client answered.

        Raises:
            ArtifactError: it is damaged.
        """
        earlier = [n for n in self._rounds() if n <= number]
        if not earlier:
            return Memory()
        tensors = load_tensors(self._of(earlier[-1]))
        return Memory(_under(_RESIDUAL, tensors), _under(_CONTROL, tensors))

    def after(self, number: int, memory: Memory) -> None:
        """Keep the state that round `number` ends with, and that it began with; what is older is removed.

        Raises:
            ResourceError: the disk is full; what was there stays.
        """
        parts = ((_RESIDUAL, memory.residual), (_CONTROL, memory.control))
        tensors = {prefix + name: tensor for prefix, held in parts for name, tensor in (held or {}).items()}
        if not tensors:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self._of(number + 1), tensors)
            for old in [n for n in self._rounds() if n <= number][:-1]:
                self._of(old).unlink()
        except OSError as error:
            raise os_error(error, self._folder) from error


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)} or None
