"""Experiment trackers, such as TensorBoard, through accelerate: what the server sees of a run, beside events.jsonl."""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from fedproxy.config import Experiment
from fedproxy.errors import UsageError
from fedproxy.federation.messages import Closed
from fedproxy.federation.store import RoundStore

FOLDER = "tracking"
"""RUN/tracking: where trackers that write files put them."""

_PROJECT = "fedproxy"
_PACKAGES = {"comet_ml": "comet-ml"}
_OF_CLIENTS = ("loss", "seconds", "tokens_per_second", "peak_memory_bytes", "bytes_up", "bytes_down")


def check_trackers(names: Collection[str]) -> None:
    """Check that the library of every tracker is installed.

    Raises:
        UsageError: one is not.
    """
    installed = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in names if name not in installed]:
        packages = " ".join(_PACKAGES.get(name, name) for name in missing)
        raise UsageError(
            f"[train] report_to names {', '.join(missing)}, which is not installed: pip install {packages}, "
            "or take it out."
        )


class Tracker:
    """Where a run's numbers go; the axis of all is the number of optimizer steps that all clients took so far.

    Args:
        accelerator: Its trackers are told; none if there are none.
        steps: Steps that all clients took in the rounds before.
    """

    def __init__(self, accelerator: Accelerator | None, steps: int) -> None:
        self._accelerator, self._steps, self._closed = accelerator, steps, steps

    def step(self, client: str, loss: float) -> None:
        """Tell the loss of a client's optimizer step."""
        self._steps += 1
        self._log({f"{client}/step_loss": loss})

    def round_closed(self, closed: Closed, seconds: float) -> None:
        """Tell what a complete round was."""
        clients, analysis = closed.record["clients"], closed.record["analysis"]
        self._closed += sum(client["steps"] for client in clients.values())
        self._steps = max(self._steps, self._closed)
        values = {"round": closed.round, "round/seconds": seconds, "round/clients": len(clients)}
        values["round/rejected"] = len(closed.record["quarantined"])
        if analysis["conflict_mean"] is not None:  # secure sums of values alone
            values["round/conflict_mean"] = analysis["conflict_mean"]
        for name, client in clients.items():
            values |= {f"{name}/{key}": client[key] for key in _OF_CLIENTS}
            for model, score in client.get("validation", {}).items():
                values[f"{name}/validation/{model}_loss"] = score["loss"]
        for key in ("heterogeneity", "weights", "retention"):
            if analysis[key]:  # a rule may weigh nobody
                values |= {f"{name}/{key}": value for name, value in zip(analysis["names"], analysis[key], strict=True)}
        self._log(values)

    def _log(self, values: dict[str, Any]) -> None:
        if self._accelerator is not None:
            self._accelerator.log(values, step=self._steps)


@contextlib.contextmanager
def open_tracker(experiment: Experiment, run: Path) -> Iterator[Tracker]:
    """The trackers that [train] report_to names, for as long as the rounds last.

    They are told the settings of [train] and [federate], no paths.

    Args:
        experiment: The experiment.
        run: The run directory.

    Raises:
        UsageError: a library is missing, or a tracker does not start.
    """
    names, records = experiment.train.report_to, RoundStore(run / "rounds").records()
    steps = sum(client["steps"] for record in records for client in record["clients"].values())
    if not names:
        yield Tracker(None, steps)
        return
    check_trackers(names)
    accelerator = Accelerator(log_with=list(names), project_dir=run / FOLDER)
    settings = experiment.as_dict()
    config = {
        f"{table}.{key}": value if isinstance(value, bool | int | float | str) else str(value)
        for table in ("train", "federate")
        for key, value in settings[table].items()
    }
    try:
        accelerator.init_trackers(_PROJECT, {"name": experiment.name, "seed": experiment.seed, **config})
    except Exception as error:
        raise UsageError(f"[train] report_to = {names}: a tracker does not start ({error}).") from error
    try:
        yield Tracker(accelerator, steps)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
