"""What Flower loads: the ServerApp drives the rounds of a run directory, the ClientApp answers orders.

What one of them alone needs is imported where it is needed: to drive rounds takes neither PEFT nor transformers, whose
import takes longer than all else that a ServerApp does before its first round.

Which run is told by the environment, or by the run configuration of `flwr run` (`experiment` and `out`).
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
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
    from fedproxy.config import Experiment
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


def _file(experiment: str) -> Path:
    """An experiment file, here or in the app's own folder, which Flower puts on the path."""
    return next((file for folder in ("", *sys.path) if (file := Path(folder, experiment)).is_file()), Path(experiment))


@contextlib.contextmanager
def _opened(run: Path, experiment: str, *, stock: bool = False) -> Iterator["RunDirectory"]:
    """The run directory: that of the process that started this one, or owned by this one.

    On a stock SuperLink the clients are elsewhere, and RUN/members.json says so from the beginning.
    """
    from fedproxy.artifacts import write_json
    from fedproxy.federation.tuning import read_run
    from fedproxy.run_directory import MEMBERS, RunDirectory, has_members, owned

    if experiment:
        from fedproxy.deployment.flower.introductions import check_clients
        from fedproxy.pipeline import prepare, read_experiment

        settings = read_experiment(_file(experiment), remote=stock)
        if stock:
            check_clients(settings)
        how: contextlib.AbstractContextManager[RunDirectory] = prepare(settings, run, resume=run.is_dir())
    elif RUN_VARIABLE in os.environ:
        how = contextlib.nullcontext(RunDirectory(run))
    else:
        how = owned(run, read_run(run), resume=True, overwrite=False)
    with how as directory:
        if stock and not has_members(run):
            write_json(run / MEMBERS, {})
        yield directory


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Drive the rounds that are left, over Flower's Grid."""
    from flwr.superlink.grid import InMemoryGrid

    from fedproxy.federation.tracking import open_tracker
    from fedproxy.federation.tuning import read_run, tune
    from fedproxy.run_directory import write_outcome

    run, outcome = _run_of(context), os.environ.get(OUTCOME_VARIABLE)
    stock = ANSWERED_VARIABLE not in os.environ and not isinstance(grid, InMemoryGrid)
    try:
        with contextlib.ExitStack() as stack:
            opening = _opened(run, str(context.run_config.get("experiment", "")), stock=stock)
            directory = stack.enter_context(opening)
            stack.enter_context(directory.driven())
            settings = read_run(run)
            names, exchange = stack.enter_context(_clients(grid, settings, directory, stock=stock))
            tracker = stack.enter_context(open_tracker(settings, run))
            tune(settings, directory, exchange, names, tracker.round_closed)
    except BaseException as error:
        if outcome:
            code = error.exit_code if isinstance(error, FedproxyError) else 1
            write_outcome(Path(outcome), code, str(error) or repr(error))
        raise
    if outcome:
        write_outcome(Path(outcome), 0, "")


@contextlib.contextmanager
def _clients(
    grid: Grid, settings: "Experiment", directory: "RunDirectory", *, stock: bool
) -> Iterator[tuple[Sequence[str], Callable[["RoundStore"], GridExchange]]]:
    """The clients' names, and what makes the way to them: to stock nodes, members, or simulated ones."""
    from fedproxy.deployment.members import read_members

    run, wire = directory.path, (settings.federate.wire, settings.federate.wire_options)
    if stock:
        from fedproxy.deployment.flower.introductions import Introductions

        with Introductions.begun(grid, settings, directory) as nodes:
            yield (
                settings.client_names,
                lambda store: GridExchange(grid, nodes.ready, store.spool, *wire, offers=nodes.offers),
            )
        return
    announced = Announced(Path(os.environ[ANSWERED_VARIABLE])) if ANSWERED_VARIABLE in os.environ else None
    names = settings.client_names or sorted(read_members(run))

    def present() -> dict[str, int]:
        online = {node.public_key: node.node_id for node in grid.get_nodes() if node.status == "online"}
        if announced is None:  # a simulation, where each node can be every client
            return dict(zip(names, sorted(online.values()), strict=False))
        members = {name: key.encode() for name, key in read_members(run).items()}
        return {name: online[key] for name, key in members.items() if key in online}

    yield names, lambda store: GridExchange(grid, present, store.spool, *wire, announced=announced)


@client.query()
def introduce(message: Message, context: Context) -> Message:
    """Say which client this node is; on a stock SuperNode."""
    from fedproxy.deployment.flower import site

    return site.introduce(message, context)


@client.query("offer")
def consider(message: Message, context: Context) -> Message:
    """Check what is offered, and take what came of the proxy; on a stock SuperNode."""
    from fedproxy.deployment.flower import site

    return site.consider(message, context)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Answer an order: of a simulation, where server and clients have one run directory, or on a stock SuperNode."""
    if message.content[TO]["offer"]:
        from fedproxy.deployment.flower import site

        return site.train(message, context)
    order, name = unpack(message.content, ORDER), str(message.content[TO]["client"])
    answer = _local(_run_of(context)).session(name).answer(name, order)[0]
    return Message(pack(ANSWER, answer), reply_to=message)


@functools.cache
def _local(run: Path) -> "LocalClients":
    """The clients of a simulation, kept for as long as this process."""
    from fedproxy.federation.local_clients import LocalClients

    return LocalClients.of(run)
