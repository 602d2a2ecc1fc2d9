"""A run's directory: whether it may be written, which stages took how long, and what happened when."""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fedproxy.artifacts import check_spared, new_file, os_error, read_json, versions, write_json
from fedproxy.config import Experiment, to_toml
from fedproxy.errors import UsageError, error_of


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


class RunDirectory:
    """RUN/: which stages are complete, and the log of events."""

    def __init__(self, path: Path, experiment: Experiment, *, resume: bool, overwrite: bool) -> None:
        if resume and overwrite:
            raise UsageError(f"{path}: --resume goes on with what is there, --overwrite starts anew. Give one of them.")
        self.path = path
        text = to_toml(experiment.as_dict())
        stored, beside = path / "experiment.toml", path / "environment.json"
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file. Give a directory.")
        for leftover in path.glob(".experiment.toml.tmp-*"):  # of a run killed in its first moment
            leftover.unlink()
        if path.is_dir() and any(path.iterdir()):
            if resume and stored.is_file():
                if stored.read_text() != text:
                    raise UsageError(
                        f"{path} was begun with another experiment (see {stored}). "
                        "Resume with the same file, or give another --out."
                    )
            elif overwrite and stored.is_file() and beside.is_file():
                check_spared(path, experiment.inputs)
                shutil.rmtree(path)
            elif stored.is_file() and beside.is_file():
                raise UsageError(
                    f"{path} exists. Go on with --resume, start anew with --overwrite, or give another path."
                )
            else:
                raise UsageError(f"{path} exists and is no run of fedproxy. Give another path.")
        for leftover in path.glob(".*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()
        if not stored.is_file():
            with new_file(stored) as file:
                file.write(text.encode())
        if not beside.is_file():
            write_json(beside, environment())

    def event(self, name: str, **values: Any) -> None:
        """Append a line to events.jsonl."""
        try:
            with open(self.path / "events.jsonl", "a") as file:
                file.write(json.dumps({"time": datetime.now(UTC).isoformat(), "event": name, **values}) + "\n")
        except OSError as error:
            raise os_error(error, self.path) from error

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Log when a stage begins and ends, and how long it took."""
        started = time.perf_counter()
        self.event("stage_started", stage=name)
        try:
            yield
        finally:
            taken = time.perf_counter() - started
            self.event("stage_ended", stage=name, seconds=taken)

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each stage, over all resumes."""
        total: dict[str, float] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.path / "events.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if event.get("event") == "stage_ended":
                        total[event["stage"]] = total.get(event["stage"], 0.0) + event["seconds"]
        return total

    @contextlib.contextmanager
    def driven(self, patience: float = 30.0) -> Iterator[None]:
        """Let one process at a time drive the rounds; the one before may take a moment to end.

        Raises:
            UsageError: another process still drives them after `patience` seconds.
        """
        until = time.monotonic() + patience
        with open(self.path / ".lock", "w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise UsageError(f"{self.path}: another process drives this run. End it first.") from None
                    time.sleep(0.2)
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
