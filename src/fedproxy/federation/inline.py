"""The inline engine: all clients one after the other in this process, on one proxy whose adapter is swapped."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from fedproxy.adapter_files import read_adapter
from fedproxy.config import Experiment
from fedproxy.errors import ArtifactError, FedproxyError, ResourceError, UsageError
from fedproxy.federation.aligning import open_aligner
from fedproxy.federation.client_rows import ClientRows, encode_for
from fedproxy.federation.local_clients import LocalClients
from fedproxy.federation.messages import Answer, Order, Refusal, Reply, Scored, Told
from fedproxy.federation.start import begin, load_proxy
from fedproxy.federation.tracking import open_tracker
from fedproxy.federation.tuning import START, OnProgress, tune
from fedproxy.models.encoding import Encoded
from fedproxy.run_directory import RunDirectory

_log = logging.getLogger(__name__)


class InlineExchange:
    """An `Exchange` whose clients are a function; all are there at any time.

    A reply's own `seconds` are held against the deadline. A training that fails costs the round that client's reply;
    what is wrong with this process or its inputs ends the run.

    Args:
        answer: Trains or scores as the named client and returns its answer.
        names: The clients' names.
    """

    def __init__(self, answer: Callable[[Order, str], Reply | Scored | Told], names: Sequence[str]) -> None:
        self._answer, self._names = answer, tuple(names)

    def available(self) -> Sequence[str]:
        """All clients."""
        return self._names

    def ask(self, orders: Mapping[str, Order], deadline: float | None) -> Iterator[tuple[str, Answer]]:
        """Train or score as each of the clients in turn."""
        for name, order in orders.items():
            yield name, self._try(order, name)

    def _try(self, order: Order, name: str) -> Answer:
        try:
            return self._answer(order, name)
        except (UsageError, ArtifactError, ResourceError):
            raise
        except FedproxyError as error:
            return Refusal(name, order.round, str(error))


def tune_inline(experiment: Experiment, directory: RunDirectory, rows: ClientRows, on_progress: OnProgress) -> None:
    """Run the rounds with all clients one after the other in this process."""
    tokenizer, examples = encode_for(directory.path / "proxy", rows, experiment)
    _tell_cut(directory, rows, examples)
    aligner = None
    if experiment.heal.realign_steps:
        begin(experiment, directory)
        model, aligner = open_aligner(experiment, directory, tokenizer)
    else:
        model = load_proxy(experiment, directory.path / "proxy")
        begin(experiment, directory, model)
    clients = LocalClients(experiment, directory.path, rows, model)
    _, fresh, _ = read_adapter(directory.path / START)
    names, rounds = sorted(examples), experiment.federate.rounds

    def reply(order: Order, name: str) -> Reply | Scored | Told:
        done = order.round - 1 + names.index(name) / len(names)

        def on_step(number: int, step: int, steps: int, loss: float) -> None:
            on_progress(
                "federate",
                (done + step / steps / len(names)) / rounds,
                f"round {number}/{rounds} · {name} · step {step}/{steps} · loss {loss:.3f}",
            )
            tracker.step(name, loss)

        session = clients.session(name)
        if aligner is not None and order.trains:
            aligner.before(order.round, {**fresh, **order.adapter})
        return session.respond(name, order, on_step)

    with directory.driven(), open_tracker(experiment, directory.path) as tracker:
        tune(experiment, directory, lambda store: InlineExchange(reply, names), names, tracker.round_closed)


def _tell_cut(directory: RunDirectory, rows: ClientRows, examples: dict[str, list[Encoded]]) -> None:
    """Tell and record how many rows of each client `max_length` cuts; those without a token to learn are left out."""
    left_out = {name: lost for name, part in examples.items() if (lost := len(rows[name]) - len(part))}
    cut = {name: n for name, part in examples.items() if (n := sum(one.cut for one in part))}
    if cut or left_out:
        told = [f"{n} of {len(rows[name])} rows of {name} are cut" for name, n in cut.items()]
        told += [f"{n} of {len(rows[name])} rows of {name} have no token to learn" for name, n in left_out.items()]
        _log.info("[train] max_length: %s.", "; ".join(told))
        directory.event("rows_encoded", cut=cut, left_out=left_out)
