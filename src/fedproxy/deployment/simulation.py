"""The engine `simulation`: the clients of an experiment as the nodes of Flower's simulation, on this machine."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fedproxy.config import Experiment
from fedproxy.deployment.flower import OUTCOME_VARIABLE, RUN_VARIABLE
from fedproxy.deployment.flower.superlink import SuperLink
from fedproxy.errors import MissingExtraError
from fedproxy.run_directory import RunDirectory, raise_outcome

POLL_SECONDS = 0.2


def simulate(experiment: Experiment, directory: RunDirectory, on_poll: Callable[[], None]) -> None:
    """Run the rounds that are left in Flower's simulation.

    As many clients train side by side as there are processors; each has one processor's threads. With secure sums they
    share one process, which holds their keys between two messages.

    Args:
        experiment: The experiment.
        directory: The run, prepared.
        on_poll: Called several times a second while it runs.

    Raises:
        FederationError: too few clients, or a round without a quorum; or Flower ended.
    """
    processors = 1 if experiment.federate.secure else os.cpu_count() or 1
    settings = {
        "num-supernodes": len(experiment.client_names),
        "client-resources-num-cpus": 1,
        "init-args-num-cpus": processors,
    }
    with tempfile.TemporaryDirectory(prefix="fedproxy-") as folder:
        outcome = Path(folder) / "outcome.json"
        environment = {RUN_VARIABLE: str(directory.path.resolve()), OUTCOME_VARIABLE: str(outcome)}
        link = SuperLink(Path(folder), certificates=None, simulation=True, environment=environment)
        try:
            link.start().run(" ".join(f"{name}={value}" for name, value in settings.items()))
            while not raise_outcome(outcome):
                link.check()
                on_poll()
                time.sleep(POLL_SECONDS)
        finally:
            link.close()


def require_ray() -> None:
    """Check that Flower's simulation is installed.

    Raises:
        MissingExtraError: it is not.
    """
    try:
        import flwr  # noqa: F401
        import ray  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("the engine simulation", "simulation") from error
