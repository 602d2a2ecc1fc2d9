"""The experiment as a whole: its tables together, and where paths stand in it."""

import dataclasses
import os
import typing
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

from fedproxy.config.checked import table
from fedproxy.config.tables import (
    LLM,
    Client,
    Compare,
    Compress,
    Evaluate,
    Federate,
    Fuse,
    Heal,
    Natural,
    Partition,
    Train,
)


@table
class Experiment:
    """The whole experiment file. Relative paths count from the folder of the file."""

    llm: LLM
    compress: Compress
    client: tuple[Client, ...] = ()
    partition: Partition | None = None
    name: str = "experiment"
    seed: Natural = 0
    heal: Heal = field(default_factory=Heal)
    train: Train = field(default_factory=Train)
    federate: Federate = field(default_factory=Federate)
    fuse: Fuse = field(default_factory=Fuse)
    evaluate: Evaluate = field(default_factory=Evaluate)
    compare: Compare | None = None

    @property
    def client_names(self) -> list[str]:
        """The clients' names, in order; none where they make themselves known, as members of a federation do."""
        if self.partition is None:
            return [client.name for client in self.client]
        count = self.partition.clients
        return [f"client-{number:0{len(str(count))}d}" for number in range(1, count + 1)]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each client's adapter that has not that of [train]."""
        return {c.name: c.lora_r for c in self.client if c.lora_r not in (None, self.train.lora_r)}

    def train_of(self, client: str) -> Train:
        """[train] as it is for a client: its own rank, at the common scaling lora_alpha / lora_r."""
        rank = self.ranks.get(client)
        if rank is None:
            return self.train
        alpha = self.train.lora_alpha * rank / self.train.lora_r
        return dataclasses.replace(self.train, lora_r=rank, lora_alpha=alpha)

    @property
    def inputs(self) -> list[str]:
        """The files and directories that it reads, or the Hub id of its LLM."""
        return list(self.paths.values())

    @property
    def paths(self) -> dict[str, str]:
        """Where in it a path stands, as in "[heal] text" → the path."""
        found: dict[str, str] = {}
        map_paths(self.as_dict(), found.setdefault)
        return found

    def as_dict(self) -> dict[str, Any]:
        """The resolved experiment as plain values, without what is not set."""
        return typing.cast("dict[str, Any]", _without_none(dataclasses.asdict(self)))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(v) for v in value]
    return value


PATHS = {
    "llm": ("path",),
    "compress": ("calibration",),
    "heal": ("text",),
    "client": ("data",),
    "partition": ("data",),
    "evaluate": ("data", "include"),
    "fuse": ("public",),
}
"""Table → keys whose values are paths once an experiment is resolved."""


def map_paths(values: Any, change: Callable[[str, str], str], where: str = "", keys: tuple[str, ...] = ()) -> Any:
    """An experiment as plain values with its paths changed, those of its variants too; what is no path stays.

    Args:
        values: The experiment's tables, as read or as `Experiment.as_dict` has them.
        change: Told where a path stands, as in "[heal] text", and the path.
        where: The table that `values` are, of a part of an experiment.
        keys: The keys of its paths.
    """
    if isinstance(values, list):
        return [map_paths(one, change, f"{where} {number}", keys) for number, one in enumerate(values, 1)]
    if not isinstance(values, dict):
        return values
    return {
        key: change(f"[{where}] {key}", value)
        if key in keys and isinstance(value, str) and value
        else map_paths(value, change, f"{where}.{key}".lstrip("."), PATHS.get(key, ()))
        for key, value in values.items()
    }


def from_folder(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`Experiment.as_dict` with its paths counted from a folder: the same wherever the folder lies.

    Args:
        values: The resolved experiment as plain values.
        folder: The folder, absolute; usually that of the experiment file.
    """
    found: dict[str, Any] = map_paths(
        values, lambda where, path: os.path.relpath(path, folder) if os.path.isabs(path) else path
    )
    return found
