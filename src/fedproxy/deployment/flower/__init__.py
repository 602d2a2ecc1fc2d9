"""Flower as the engine: the same coordinator and clients, in Flower's simulation or between organisations.

    exchange.py    the server's side: orders and answers over Flower's Grid
    announced.py   what became of each order, told by the gateway to the server's side
    requests.py    who signed a SuperNode's request
    fleet.py       what the gateway lets through to Flower's Fleet API, client by client
    runtime.py     tasks that a SuperLink or SuperNode puts up, acquired and answered
    superlink.py   the processes of the owner: SuperLink, and the ServerApp of the run on it
    supernode.py   the process of a data owner: a SuperNode
    command.py     runs Flower's commands;  process.py lets nothing of them outlive their owner
    ports.py       the ports they listen at, which nobody else gets before
    app.py         what Flower loads: ServerApp and ClientApp
    introductions.py, site.py    the two sides where SuperLink and SuperNodes are Flower's own, and other people's

Only this package imports flwr. Flower is used as it is: nothing of it is replaced.
"""

import os
from collections.abc import Mapping

from fedproxy.errors import MissingExtraError
from fedproxy.idle_threads import sleep_soon

SETTINGS = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of every Flower process: no telemetry, no update check, no dependency synchronisation."""

PART_BYTES = 320 << 10
"""A client cuts its answer into parts of so many bytes, and sends one at a time. A part must be over within the 30 s
after which a SuperNode sends it again, and within the 180 s after which a SuperLink forgets the whole: so 12 kB a
second suffice. What a client gets is bound by neither."""

CLIENT_SETTINGS = {
    **SETTINGS,
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(PART_BYTES),
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES": "1",
}
"""Environment of a client's Flower processes."""

RUN_VARIABLE = "FEDPROXY_RUN"
"""Names the run directory to Flower's ServerApp, and in a simulation to its ClientApps."""

OUTCOME_VARIABLE = "FEDPROXY_OUTCOME"
"""Names the file in which Flower's ServerApp notes how it ended."""

ANSWERED_VARIABLE = "FEDPROXY_ANSWERED"
"""Names the folder in which the gateway announces to Flower's ServerApp what became of each order."""


def spare_loopback() -> None:
    """Let nothing that this process or one that it starts asks of this machine go through a proxy."""
    spared = [part for name in ("no_proxy", "NO_PROXY") for part in os.environ.get(name, "").split(",") if part]
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(dict.fromkeys([*spared, "127.0.0.1", "localhost"]))


def prepare(settings: Mapping[str, str] = SETTINGS) -> None:
    """Set this process up for Flower, before it is imported.

    Args:
        settings: Its environment.

    Raises:
        MissingExtraError: Flower is not installed.
    """
    os.environ.update(settings)
    spare_loopback()
    require_flower()


def require_flower() -> None:
    """Check that Flower is installed.

    Raises:
        MissingExtraError: it is not.
    """
    try:
        import flwr  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("a federation of several processes", "federation") from error


sleep_soon()  # here, since commands of stock Flower load `app`, which imports torch
