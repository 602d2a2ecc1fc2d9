"""Flower as the engine: the same coordinator and clients, in Flower's simulation or between organisations.

    exchange.py    the server's side: orders and answers over Flower's Grid
    superlink.py   the processes of the owner: SuperLink and the run on it
    supernode.py   the process of a data owner: a SuperNode at a pace of its own
    clientapps.py  starts ClientApps without importing Flower anew for each message

Only this package and `fedproxy.deployment.flower.app`, which Flower loads, import flwr.
"""

import os

from fedproxy.errors import MissingExtraError

QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of every Flower process: no telemetry, no update check, no dependency synchronisation."""

RUN_VARIABLE = "FEDPROXY_RUN"
"""Names the run directory to Flower's ServerApp, and in a simulation to its ClientApps."""

OUTCOME_VARIABLE = "FEDPROXY_OUTCOME"
"""Names the file in which Flower's ServerApp notes how it ended."""

WORKER_VARIABLE = "FEDPROXY_WORKER"
"""Names the socket of the warm worker to the ClientApps of a data owner."""


def spare_loopback() -> None:
    """Let nothing that this process or one that it starts asks of this machine go through a proxy."""
    spared = [part for name in ("no_proxy", "NO_PROXY") for part in os.environ.get(name, "").split(",") if part]
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(dict.fromkeys([*spared, "127.0.0.1", "localhost"]))


def require_flower() -> None:
    """Check that Flower is installed.

    Raises:
        MissingExtraError: it is not.
    """
    try:
        import flwr  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("a federation of several processes", "federation") from error
