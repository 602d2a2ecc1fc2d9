"""What Flower loads: the ServerApp drives the rounds of a run directory, the ClientApp answers orders.

Which run is told by the environment, or by the run configuration of `flwr run` (`experiment` and `out`).
"""

import contextlib
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedproxy.deployment.flower import ANSWERED_VARIABLE, OUTCOME_VARIABLE, RUN_VARIABLE
from fedproxy.deployment.flower.announced import Announced
from fedproxy.deployment.flower.exchange import ANSWER, ORDER, TO, GridExchange, pack, unpack
from fedproxy.errors import FedproxyError, UsageError

if TYPE_CHECKING:
    from fedproxy.federation.local_clients import LocalClients
    from fedproxy.federation.store import RoundStore
    from fedproxy.run_directory import RunDirectory

server = ServerApp()
client = ClientApp()


def _run_of(context: Context) -> Path:
    named = os.environ.get(RUN_VARIABLE) or context.run_config.get("out", "")
    if not named:
        raise UsageError('Name the run: flwr run . --run-config \'experiment="FILE" out="DIR"\'.')
    return Path(str(named))


def _opened(run: Path, experiment: str) -> contextlib.AbstractContextManager["RunDirectory"]:
    """The run directory: that of the process that started this one, or owned by this one."""
    from fedproxy.federation.tuning import read_run
    from fedproxy.pipeline import prepare
    from fedproxy.run_directory import RunDirectory, owned

    if experiment:
        return prepare(experiment, run, resume=run.is_dir())
    if RUN_VARIABLE in os.environ:
        return contextlib.nullcontext(RunDirectory(run))
    return owned(run, read_run(run), resume=True, overwrite=False)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Drive the rounds that are left, over Flower's Grid."""
    from fedproxy.deployment.members import read_members
    from fedproxy.federation.client_rows import client_names
    from fedproxy.federation.tracking import open_tracker
    from fedproxy.federation.tuning import read_run, tune
    from fedproxy.run_directory import has_members, write_outcome

    run = _run_of(context)

    def nodes() -> dict[str, int]:
        online = {node.public_key: node.node_id for node in grid.get_nodes() if node.status == "online"}
        if not has_members(run):  # a simulation, where each node can be every client
            return dict(zip(names, sorted(online.values()), strict=False))
        members = {name: key.encode() for name, key in read_members(run).items()}
        return {name: online[key] for name, key in members.items() if key in online}

    try:
        with _opened(run, str(context.run_config.get("experiment", ""))) as directory, directory.driven():
            settings = read_run(run)
            names = client_names(settings) or sorted(read_members(run))
            wire = settings.federate.wire, settings.federate.wire_options
            announced = Announced(Path(os.environ[ANSWERED_VARIABLE])) if ANSWERED_VARIABLE in os.environ else None

            def exchange(store: "RoundStore") -> GridExchange:
                return GridExchange(grid, nodes, store.spool, *wire, announced=announced)

            with open_tracker(settings, run) as tracker:
                tune(settings, directory, exchange, names, tracker.round_closed)
    except BaseException as error:
        if outcome := os.environ.get(OUTCOME_VARIABLE):
            code = error.exit_code if isinstance(error, FedproxyError) else 1
            write_outcome(Path(outcome), code, str(error) or repr(error))
        raise
    if outcome := os.environ.get(OUTCOME_VARIABLE):
        write_outcome(Path(outcome), 0, "")


@client.train()
def train(message: Message, context: Context) -> Message:
    """Answer an order to a client of a simulation."""
    order, name = unpack(message.content, ORDER), str(message.content[TO]["client"])
    answer = _local(_run_of(context)).session(name).answer(name, order)[0]
    return Message(pack(ANSWER, answer), reply_to=message)


@functools.cache
def _local(run: Path) -> "LocalClients":
    """The clients of a simulation, kept for as long as this process."""
    from fedproxy.federation.local_clients import LocalClients

    return LocalClients.of(run)
