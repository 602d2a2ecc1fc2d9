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
from fedproxy.federation.offer import make_offer
from fedproxy.federation.session import Session
from fedproxy.federation.tuning import CLIENTS, START, Rows, client_names, client_rows, read_run
from fedproxy.models.lora import read_adapter
from fedproxy.run_directory import RunDirectory, raise_outcome
from fedproxy.seeds import derive_seed
from fedproxy.tensors import digest

POLL_SECONDS = 0.2


def simulate(experiment: Experiment, directory: RunDirectory, on_poll: Callable[[], None]) -> None:
    """Run the rounds that are left in Flower's simulation.

    As many clients train side by side as there are processors; each has one processor's threads.

    Args:
        experiment: The experiment.
        directory: The run, prepared.
        on_poll: Called several times a second while it runs.

    Raises:
        FederationError: too few clients, or a round without a quorum; or Flower ended.
    """
    processors = os.cpu_count() or 1
    settings = {
        "num-supernodes": len(client_names(experiment)),
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


class LocalClients:
    """All clients of a run in this process, each made ready when it is first asked.

    Args:
        run: The run directory.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._experiment = run, read_run(run)
        self._start = digest(read_adapter(run / START)[1])
        self._sessions: dict[int, Session] = {}
        self._rows: dict[str, Rows] = client_rows(self._experiment)

    def _session(self, client: str) -> Session:
        """The session that clients of its rank share."""
        rank = self._experiment.train_of(client).lora_r
        if rank not in self._sessions:
            identity = str(derive_seed(0, str(self._run)))
            offer = make_offer(self._experiment, client, run_id=identity, proxy="0" * 64, start=self._start)
            trust = self._experiment.llm.trust_remote_code
            self._sessions[rank] = Session(
                self._run / "proxy", offer, state=self._run / CLIENTS, trust_remote_code=trust
            )
        return self._sessions[rank]

    def answer(self, client: str, order: bytes) -> bytes:
        """Train as `client`; see `Session.answer`."""
        session = self._session(client)
        if not session.knows(client):
            session.add(client, self._rows.pop(client))
        return session.answer(client, order)[0]
