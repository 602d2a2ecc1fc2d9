"""A run's rounds on disk. A round appears complete or not at all, so a kill loses at most the open one."""

import shutil
from pathlib import Path
from typing import Any

import torch

from fedproxy.artifacts import new_directory, os_error, read_json, write_json
from fedproxy.errors import ArtifactError
from fedproxy.federation.messages import Closed
from fedproxy.records import Round
from fedproxy.tensor_files import load_tensors, save_tensors
from fedproxy.typed_json import as_record

_ADAPTER, _CONFLICT = "adapter.safetensors", "conflict.safetensors"
_SERVER, _STATE = "server_optimizer.safetensors", "regulariser.safetensors"


class RoundStore:
    """The folder RUN/rounds: 0001/, 0002/, ..., each with adapter.safetensors, conflict.safetensors and round.json.

    With a server optimizer that has a state there is server_optimizer.safetensors, too, and regulariser.safetensors
    with a regulariser that has one; where the space of the merge has none there is no conflict.

    Args:
        folder: The folder.
        keep: Rounds whose tensors are kept, 0 for all; every round keeps its round.json.
    """

    def __init__(self, folder: Path, *, keep: int = 0) -> None:
        self.folder, self._keep = Path(folder), keep

    def _of(self, number: int) -> Path:
        return self.folder / f"{number:04d}"

    def spool(self) -> Path:
        """An empty folder for the open round's replies; what lay in it before is gone.

        Raises:
            UsageError, ResourceError: it cannot be made.
        """
        folder = self.folder / ".open"
        try:
            self._clear_spool()
            folder.mkdir(parents=True)
        except OSError as error:
            raise os_error(error, folder) from error
        return folder

    def _clear_spool(self) -> None:
        shutil.rmtree(self.folder / ".open", ignore_errors=True)

    def save(self, closed: Closed, *, seconds: float, best: int = 0) -> None:
        """Write a complete round; it is there, synced, when this returns.

        Only then are the tensors of rounds that need not be kept removed, and the open round's replies. The adapter of
        round `best` is needed.

        Raises:
            ResourceError: the disk is full; the rounds before are untouched.
        """
        with new_directory(self._of(closed.round)) as folder:
            save_tensors(folder / _ADAPTER, closed.adapter)
            for name, tensors in (
                (_CONFLICT, closed.conflict),
                (_SERVER, closed.server_state),
                (_STATE, closed.state),
            ):
                if tensors:
                    save_tensors(folder / name, tensors)
            write_json(folder / "round.json", {**closed.record, "seconds": seconds})
        self._clear_spool()
        if self._keep:
            for number in range(1, closed.round - self._keep + 1):
                for name in (_ADAPTER, _CONFLICT, _SERVER, _STATE)[number == best :]:
                    (self._of(number) / name).unlink(missing_ok=True)

    def adapter(self, number: int) -> dict[str, torch.Tensor]:
        """The adapter that a complete round ended with.

        Raises:
            ArtifactError: it is damaged, or was removed.
        """
        return load_tensors(self._of(number) / _ADAPTER)

    def count(self) -> int:
        """Number of complete rounds, counted from the first without a gap."""
        number = 0
        while self._of(number + 1).is_dir():
            number += 1
        return number

    def records(self) -> list[dict[str, Any]]:
        """The `round.json` of every complete round; raises as `record` does."""
        return [self.record(number) for number in range(1, self.count() + 1)]

    def record(self, number: int) -> dict[str, Any]:
        """The `round.json` of a complete round.

        Raises:
            ArtifactError: it is damaged, or that of another round.
        """
        path = self._of(number) / "round.json"
        record: dict[str, Any] = read_json(path)
        if (given := as_record(record, Round, str(path)).number) != number:
            raise ArtifactError(f"{path} is of round {given}, not {number}.")
        return record

    def latest(self) -> Closed | None:
        """Read the last complete round; none if there is none. Leftovers of a killed process are removed.

        Raises:
            ArtifactError: the round is damaged.
        """
        self._clear_spool()
        for leftover in self.folder.glob(".*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        records = self.records()
        if not records:
            return None
        folder = self._of(len(records))
        conflict, server_state, state = (
            load_tensors(folder / name) if (folder / name).is_file() else {} for name in (_CONFLICT, _SERVER, _STATE)
        )
        return Closed(len(records), load_tensors(folder / _ADAPTER), conflict, server_state, state, records[-1])
