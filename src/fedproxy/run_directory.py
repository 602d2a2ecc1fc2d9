"""A run's directory: whether it may be written, which stages took how long, and what happened when."""

import contextlib
import filecmp
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fedproxy.artifacts import check_spared, locked, new_file, os_error, read_json, versions, write_json
from fedproxy.config import Experiment, to_toml
from fedproxy.errors import FedproxyError, UsageError, error_of
from fedproxy.events import EVENTS, event_of
from fedproxy.typed_json import Record, read_record

MEMBERS = "members.json"
"""RUN/members.json: the clients that are other machines, and their keys."""


def has_members(run: Path) -> bool:
    """Whether the clients of this run are other machines, whose keys tell who they are."""
    return (run / MEMBERS).is_file()


def environment() -> dict[str, Any]:
    """Versions and hardware, as they stand in environment.json."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (platform.processor() or platform.machine())
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": sys.argv[1:],
    }


PATIENCE_SECONDS, ENDING_SECONDS = 30.0, 2.0
"""How long the processes that a killed one started, and that one itself, may take to end."""
_OWNER, _DRIVER = ".owner", ".lock"
_STORED, _ENVIRONMENT = "experiment.toml", "environment.json"
_MADE = {"name": (), "compare": (), "evaluate": ("work",), "fuse": ("fused", "work")}
"""Tables that may be changed when a run is gone on with, unless this, which they shape, is there already."""
_FREE = ("[train] report_to", *(f"[federate] {key}" for key in ("deadline", "quorum", "retries", "patience")))
"""Settings that may be changed at any time: no complete round would be another by what is waited for, or not."""
_SCORED = ("evaluation.json", "validation.json", "results.json", "report.html")
_ROWS = "rows.json"
"""RUN/rows.json: the digests of the clients' rows, where they are on the machine of the run."""
_TRAINED = ("rounds", "cells")
"""What a run, or a comparison, has once something was trained."""
_FIRST = re.compile(rf"{re.escape(_OWNER)}|{re.escape(_DRIVER)}|\.{re.escape(_STORED)}\.tmp-.*")
"""What a run may hold that was killed in its first moment."""


@contextlib.contextmanager
def owned(path: Path, experiment: Experiment, *, resume: bool, overwrite: bool) -> Iterator["RunDirectory"]:
    """Begin a run, or go on with one; until the block ends, however it does, no other process can.

    Args:
        path: The directory.
        experiment: The experiment.
        resume: Go on with a run of the same experiment. What it reads may have been moved, and what shapes nothing
            that was made may be another: [evaluate], whose scores are then made anew, or for how many clients a round
            waits, and how long.
        overwrite: Empty the directory of an earlier run.

    Raises:
        UsageError: the directory holds something else, or a run that neither may be; or another process is at work.
    """
    if resume and overwrite:
        raise UsageError(f"{path}: --resume goes on with what is there, --overwrite starts anew. Give one of them.")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file. Give a directory.")
    if path.is_dir() and not _is_run(path) and not all(_FIRST.fullmatch(item.name) for item in path.iterdir()):
        raise UsageError(f"{path} exists and is no run of fedproxy. Give another path.")
    busy = f"Another process is at work on {path}. Wait until it is done, or end it first."
    with locked(path / _OWNER, ENDING_SECONDS, busy):
        directory = RunDirectory(path)
        with directory.driven():
            if _open(path, experiment, resume=resume, overwrite=overwrite):
                directory.resumed()
        yield directory


def _is_run(path: Path) -> bool:
    """Whether a directory is a run, and not one that holds somebody's experiment file."""
    return (path / _STORED).is_file() and any((path / name).is_file() for name in (_OWNER, _ENVIRONMENT))


def _open(path: Path, experiment: Experiment, *, resume: bool, overwrite: bool) -> bool:
    """Make the directory that of a run of the experiment, and tell whether it is one begun before."""
    stored, text = path / _STORED, to_toml(experiment.as_dict())
    resumed = resume and stored.is_file()
    if stored.is_file():
        if resume:
            _change(path, stored, text)
        if not resume and not overwrite:
            raise UsageError(f"{path} exists. Go on with --resume, start anew with --overwrite, or give another path.")
        if not resume:
            check_spared(path, experiment.inputs)
            _remove(item for item in path.iterdir() if item.name not in (_OWNER, _DRIVER, _STORED))
            _remove([stored])  # last: what a kill leaves is still a run's
    _remove(path.glob(".*.tmp-*"))
    if not stored.is_file():
        with new_file(stored) as file:
            file.write(text.encode())
    if not (path / _ENVIRONMENT).is_file():
        write_json(path / _ENVIRONMENT, environment())
    return resumed


def _change(path: Path, stored: Path, text: str) -> None:
    """Let a run go on as the experiment `text` says.

    Raises:
        UsageError: that is another experiment than what was made belongs to; the keys that differ are named.
    """
    try:
        old, new = (_flat(tomllib.loads(toml)) for toml in (stored.read_text(encoding="utf-8-sig"), text))
    except (OSError, ValueError) as error:
        raise UsageError(f"{stored} cannot be read ({error}). Give another --out.") from error
    changed = [key for key in {**old, **new} if not _is_same(old.get(key), new.get(key))]
    fixed = [key for key in changed if any((path / made).exists() for made in _MADE.get(key[0], (".",)))]
    if fixed := [key for key in fixed if key[1] not in _FREE]:
        told = "; ".join(f"{key[1]} was {old.get(key, 'not set')!r}, is {new.get(key, 'not set')!r}" for key in fixed)
        raise UsageError(
            f"{path} was begun with another experiment: {told}. Resume with the values of {stored}, or give another "
            "--out."
        )
    if any(table in ("evaluate", "fuse") for table, _ in changed):
        _remove(path / name for name in _SCORED if (path / name).exists())
    if old != new:
        with new_file(stored) as file:
            file.write(text.encode())


def _flat(values: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """The settings of an experiment by their table and the name that errors give them, as "[client 2] data"."""
    found: dict[tuple[str, str], Any] = {}
    for name, value in values.items():
        if isinstance(value, list):
            tables = {f"[{name} {number}] ": table for number, table in enumerate(value, 1)}
        else:
            tables = {f"[{name}] ": value} if isinstance(value, dict) else {"": {name: value}}
        found |= {(name, where + key): entry for where, table in tables.items() for key, entry in table.items()}
    return found


def _is_same(old: Any, new: Any) -> bool:
    """Whether two settings are equal, or paths of the same input: it was moved, or lies in both places."""
    if old == new or not all(isinstance(value, str) and os.path.isabs(value) for value in (old, new)):
        return bool(old == new)
    one, other = Path(old), Path(new)
    if one.name != other.name or not one.exists():
        return one.name == other.name
    if not (one.is_dir() and other.is_dir()):
        return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)
    sizes = [{f.name: f.stat().st_size for f in place.iterdir() if f.is_file()} for place in (one, other)]
    return sizes[0] == sizes[1]


def _remove(items: Iterable[Path]) -> None:
    for item in items:
        try:
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
        except OSError as error:
            raise os_error(error, item) from error


class _Noted(Record):
    sha256: dict[str, str]


def _sha256(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


class RunDirectory:
    """RUN/: which stages are complete, and the log of events; for a process that owns it, or that such a one started.

    Args:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def event(self, name: str, **values: Any) -> None:
        """Append a line to events.jsonl."""
        self._append(json.dumps({"time": datetime.now(UTC).isoformat(), "event": name, **values}) + "\n")

    def _append(self, text: str) -> None:
        try:
            with open(self.path / EVENTS, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise os_error(error, self.path) from error

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Log when a stage begins, and when and how it ends: done, failed (with the error) or interrupted."""
        started = time.perf_counter()
        self.event("stage_started", stage=name)
        try:
            yield
        except BaseException as error:
            failed = {"outcome": "failed", "error": str(error) or repr(error)}
            how = failed if isinstance(error, Exception) else {"outcome": "interrupted"}
            with contextlib.suppress(FedproxyError):  # a full disk, perhaps; what ended the stage is what is told
                self.event("stage_ended", stage=name, seconds=time.perf_counter() - started, **how)
            raise
        self.event("stage_ended", stage=name, seconds=time.perf_counter() - started, outcome="done")

    def resumed(self) -> None:
        """Log that the run is gone on with, below a line that a kill or a full disk cut short."""
        with contextlib.suppress(FileNotFoundError):
            if (content := (self.path / EVENTS).read_bytes()) and not content.endswith(b"\n"):
                self._append("\n")
        self.event("resumed")

    def check_same_rows(self, rows: Mapping[str, Any]) -> None:
        """Note which rows are trained on; once something was trained, check that they are those noted before.

        Args:
            rows: Whose → the rows, as JSON has them. Who has no note yet gets one.

        Raises:
            UsageError: somebody has other rows than noted; the name is told.
            ArtifactError: the note is damaged.
        """
        path, found = self.path / _ROWS, {whose: _sha256(part) for whose, part in rows.items()}
        begun = path.is_file() and any((self.path / made).is_dir() for made in _TRAINED)
        noted = read_record(path, _Noted).sha256 if begun else {}
        if other := sorted(whose for whose in found if noted.get(whose, found[whose]) != found[whose]):
            raise UsageError(
                f"{self.path} was begun with other rows of {', '.join(other)}. Go on with those or give another --out."
            )
        if found.keys() - noted.keys():
            write_json(path, {"sha256": noted | found})

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each stage, over all resumes."""
        total: dict[str, float] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.path / EVENTS).read_bytes().splitlines():
                event = event_of(line)
                if event.get("event") == "stage_ended":
                    total[event["stage"]] = total.get(event["stage"], 0.0) + event["seconds"]
        return total

    @contextlib.contextmanager
    def driven(self) -> Iterator[None]:
        """Let one process at a time drive the rounds; one whose owner was killed may take a moment to end.

        Raises:
            UsageError: another process still drives them after `PATIENCE_SECONDS`.
        """
        busy = f"{self.path}: another process drives this run. End it first."
        with locked(self.path / _DRIVER, PATIENCE_SECONDS, busy):
            yield


def write_outcome(path: Path, code: int, text: str) -> None:
    """Note how the process that drove the rounds ended, for the one that started it.

    Args:
        path: The file in which that one looks; it lies outside the run, where a later process would find it.
        code: Its exit code.
        text: Its error; empty if there was none.
    """
    write_json(path, {"code": code, "text": text})


def raise_outcome(path: Path) -> bool:
    """Whether the process that drives the rounds has ended well.

    Raises:
        FedproxyError: it ended with this error.
    """
    if not path.is_file():
        return False
    outcome = read_json(path)
    if outcome["code"] == 0:
        return True
    raise error_of(outcome["code"], outcome["text"])
