"""A run's rounds on disk. A round appears complete or not at all, so a kill loses at most the open one."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedproxy.artifacts import new_directory, read_json, write_json
from fedproxy.errors import ArtifactError
from fedproxy.federation.coordinator import Closed
from fedproxy.tensor_files import load_tensors, save_tensors


@dataclass(frozen=True)
class Stored:
    """The last complete round as read back."""

    round: int
    adapter: dict[str, torch.Tensor]
    conflict: dict[str, torch.Tensor]


class RoundStore:
    """The folder RUN/rounds: 0001/, 0002/, ..., each with adapter.safetensors, conflict.safetensors and round.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def _of(self, number: int) -> Path:
        return self.folder / f"{number:04d}"

    def save(self, closed: Closed, *, seconds: float) -> None:
        """Write a complete round; it is there, synced, when this returns.

        Raises:
            ResourceError: the disk is full; the rounds before are untouched.
        """
        with new_directory(self._of(closed.round)) as folder:
            save_tensors(folder / "adapter.safetensors", closed.adapter)
            save_tensors(folder / "conflict.safetensors", closed.conflict)
            write_json(folder / "round.json", {**closed.record, "seconds": seconds})

    def count(self) -> int:
        """Number of complete rounds, counted from the first without a gap."""
        number = 0
        while self._of(number + 1).is_dir():
            number += 1
        return number

    def records(self) -> list[dict[str, Any]]:
        """The `round.json` of every complete round."""
        return [read_json(self._of(number) / "round.json") for number in range(1, self.count() + 1)]

    def latest(self) -> Stored | None:
        """Read the last complete round; none if there is none. Leftovers of a killed write are removed.

        Raises:
            ArtifactError: the round is damaged.
        """
        for leftover in self.folder.glob(".*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        number = self.count()
        if number == 0:
            return None
        folder = self._of(number)
        record = read_json(folder / "round.json")
        if record.get("round") != number:
            raise ArtifactError(f"{folder}/round.json is of round {record.get('round')}, not {number}.")
        return Stored(
            number, load_tensors(folder / "adapter.safetensors"), load_tensors(folder / "conflict.safetensors")
        )
