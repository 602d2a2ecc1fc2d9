"""All clients of a run on this machine, each behind a session, as a data owner elsewhere is."""

from dataclasses import replace
from pathlib import Path

from fedproxy.adapter_files import read_adapter
from fedproxy.config import Experiment
from fedproxy.federation.client_rows import ClientRows, client_rows
from fedproxy.federation.offer import make_offer
from fedproxy.federation.session import Session
from fedproxy.federation.start import load_proxy
from fedproxy.federation.tuning import CLIENTS, START, read_run
from fedproxy.models.checkpoints import load_tokenizer
from fedproxy.models.lora import AdaptedModel
from fedproxy.seeds import derive_seed
from fedproxy.tensors import digest


class LocalClients:
    """The clients of a run in this process; those of one rank share a session, made ready when it is first asked.

    Args:
        experiment: The experiment.
        run: The run directory, with its proxy and RUN/start.
        rows: The clients' rows.
        model: The proxy with a fresh adapter of the rank of [train], if it is loaded already.
    """

    def __init__(self, experiment: Experiment, run: Path, rows: ClientRows, model: AdaptedModel | None = None) -> None:
        self._experiment, self._run, self._rows = experiment, run, rows
        self._tokenizer = load_tokenizer(run / "proxy", trust_remote_code=experiment.llm.trust_remote_code)
        self._models = {} if model is None else {experiment.train.lora_r: model}
        self._start = digest(read_adapter(run / START)[1])
        self._sessions: dict[int, Session] = {}

    @staticmethod
    def of(run: Path) -> "LocalClients":
        """The clients of a run that was prepared, each with the rows that its experiment names."""
        experiment = read_run(run)
        return LocalClients(experiment, run, client_rows(experiment))

    def session(self, client: str) -> Session:
        """The session in which a client answers; its rows are there.

        Raises:
            ArtifactError: the proxy cannot be used.
        """
        train = self._experiment.train_of(client)
        if train.lora_r not in self._sessions:
            model = self._models.get(train.lora_r)
            if model is None:
                model = load_proxy(replace(self._experiment, train=train), self._run / "proxy")
            offer = make_offer(
                self._experiment,
                client,
                run_id=str(derive_seed(0, str(self._run))),
                proxy="0" * 64,
                start=self._start,
            )
            state = self._run / CLIENTS
            session = self._sessions[train.lora_r] = Session(model, self._tokenizer, offer, state=state)
            if self._experiment.federate.secure:
                from fedproxy.privacy.sums.identity import drawn  # needs the extra federation

                session.identities = drawn(self._rows)
        session = self._sessions[train.lora_r]
        if not session.knows(client):
            how = (self._tokenizer, session.longest, train)
            session.add(client, self._rows.examples(client, *how), self._rows.validation(client, *how))
        return session
