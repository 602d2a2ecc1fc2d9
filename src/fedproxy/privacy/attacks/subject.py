"""A finished run as attackers find it: its models, the rows that were trained on, and rows like them that were not."""

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedproxy.adapter_files import read_adapter
from fedproxy.aggregation.space import SPACES, trained
from fedproxy.artifacts import Manifest
from fedproxy.config import Client, Experiment, Train
from fedproxy.errors import ArtifactError
from fedproxy.federation.aligning import proxy_adapter
from fedproxy.federation.client_rows import ClientRows, client_rows, rows_of
from fedproxy.federation.messages import Order, Reply
from fedproxy.federation.offer import make_offer
from fedproxy.federation.session import Session
from fedproxy.federation.start import load_proxy
from fedproxy.federation.tuning import START, read_run
from fedproxy.models.checkpoints import Tokenizer, load_config, load_tokenizer, padding
from fedproxy.models.encoding import Encoded, training_examples
from fedproxy.models.families import readable
from fedproxy.models.lora import AdaptedModel, adapter_state, load_with_adapter, set_adapter_state
from fedproxy.models.validating import OPTIONS
from fedproxy.run_directory import has_members
from fedproxy.seeds import derive_seed
from fedproxy.tensors import Tensors, digest

Row = dict[str, Any]
_OF_THE_ADAPTER = {"lora_r", "lora_alpha", "lora_dropout", "lora_targets", "blocks"}
"""Settings of [train] that another adapter takes."""


@dataclass(frozen=True)
class Pair:
    """Rows of one client that were trained on, and rows of the same source that nobody trained on.

    Attributes:
        client: The client's name.
        members: The former.
        others: The latter.
    """

    client: str
    members: list[Row]
    others: list[Row]


class Subject:
    """A run that is attacked; nothing of it is changed.

    Args:
        path: The run directory.

    Raises:
        ArtifactError: it is no run, or has no adapter yet.
        ConfigError: its experiment cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "adapter").is_dir():
            raise ArtifactError(
                f"{path} holds no tuned adapter to attack. Give the directory of a run whose rounds are complete; "
                "`fedproxy run --resume` completes one."
            )
        self.experiment: Experiment = read_run(path)
        self.proxy, self.seed = path / "proxy", self.experiment.seed
        self.manifest = Manifest.read(self.proxy)

    @property
    def absent_rows(self) -> str:
        """Why there are no rows to attack with; empty if there are."""
        if has_members(self.path):
            return "The clients' rows are on other machines. Each client can audit a run of its own on its own rows."
        return ""

    @functools.cached_property
    def rows(self) -> ClientRows:
        """The clients' training rows, by name; errors as of `client_rows`."""
        return client_rows(self.experiment)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of proxy and LLM."""
        return load_tokenizer(self.proxy, trust_remote_code=self.experiment.llm.trust_remote_code)

    @property
    def pad(self) -> int:
        """The padding token."""
        return padding(self.tokenizer)

    def pairs(self, most: int) -> tuple[list[Pair], list[str]]:
        """Members and non-members of every client, at most so many of each, drawn by the experiment's seed.

        Non-members are rows of the client's file or task that no client trained on: those beyond its number of `rows`,
        and those kept back for validation. A row that stands twice counts once.

        Returns:
            The pairs, and a sentence for each client that has none.
        """
        used = {_key(row) for rows in self.rows.values() for row in rows}
        found, missing = [], []
        for name in sorted(self.rows):
            members = list({_key(row): row for row in self.rows[name]}.values())
            others = list({key: row for row in self._source(name) if (key := _key(row)) not in used}.values())
            if not others:
                missing.append(
                    f"{name}: all rows of its source were trained on. Keep some back: [[client]] rows, or [federate] "
                    "validation."
                )
                continue
            found.append(Pair(name, *(self._some(part, most, name) for part in (members, others))))
        return found, missing

    def _source(self, name: str) -> Sequence[Row]:
        """All rows that a client's rows were drawn from."""
        cut = self.experiment.partition
        if cut is not None:
            client = Client("partition", cut.data, cut.task)
        else:
            client = replace(next(one for one in self.experiment.client if one.name == name), rows=None)
        return rows_of(client, self.experiment.evaluate, self.seed)

    def _some(self, rows: list[Row], most: int, name: str) -> list[Row]:
        drawn = np.random.default_rng(derive_seed(self.seed, "audit", name)).permutation(len(rows))[:most]
        return [rows[i] for i in sorted(drawn.tolist())]

    def examples(self, rows: Sequence[Mapping[str, Any]], most: int | None = None) -> list[Encoded]:
        """Rows as the proxy was trained to read them, or with `most` tokens each; errors as of `training_examples`."""
        return training_examples(rows, self.tokenizer, self.experiment.train, most or self.longest)

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of a row that the proxy was trained to read, at most."""
        config = load_config(self.proxy, trust_remote_code=self.experiment.llm.trust_remote_code)
        return readable(config, self.experiment.train.max_length)

    def tuned_proxy(self) -> AdaptedModel:
        """The proxy with the adapter that the run ended with: what every client has; errors as of loading."""
        return self._with(self.proxy, proxy_adapter(self.path))

    def fused(self, adapter: Path | None = None) -> AdaptedModel:
        """The LLM with an adapter for it, that of the run by default; errors as of loading."""
        return self._with(self.experiment.llm.path, adapter or self.path / "fused")

    def _with(self, base: str | Path, adapter: Path) -> AdaptedModel:
        trust = self.experiment.llm.trust_remote_code
        return load_with_adapter(base, adapter, dtype=torch.float32, trust_remote_code=trust)

    @property
    def is_fused(self) -> bool:
        """Whether the run keeps the fused LLM."""
        return (self.path / "fused").is_dir()

    @functools.cached_property
    def _trainable(self) -> AdaptedModel:
        return load_proxy(self.experiment, self.proxy)

    @functools.cached_property
    def start(self) -> Tensors:
        """The adapter that the run began with."""
        return read_adapter(self.path / START)[1]

    def before_training(self) -> AdaptedModel:
        """The proxy with the adapter that the run began with; the same model each time, which `update` trains."""
        set_adapter_state(self._trainable, self.start)
        return self._trainable

    def update(self, client: str, examples: Sequence[Encoded], changes: Mapping[str, Any] | None = None) -> Reply:
        """A client's answer in the first round, as the server gets it: trained anew, by what the run's clients run.

        Args:
            client: Its name.
            examples: The rows that it trains on.
            changes: Settings of [train] that a server asks for in place of the run's.

        Raises:
            DivergedError: the training diverged.
            ArtifactError: as of `Session.train`.
        """
        train: Train = replace(self.experiment.train, **(changes or {}))
        experiment = replace(self.experiment, train=train)
        model, start = self.before_training(), self.start
        if not _OF_THE_ADAPTER.isdisjoint(changes or {}):
            model = load_proxy(experiment, self.proxy)
            start = adapter_state(model)
        offer = make_offer(experiment, client, run_id="audit", proxy="0" * 64, start=digest(start))
        with tempfile.TemporaryDirectory(prefix="fedproxy-") as folder:
            session = Session(model, self.tokenizer, offer, state=Path(folder))
            session.add(client, examples)
            adapter = trained(SPACES.choose(self.experiment.federate.space), session.fresh)
            reply = session.train(client, Order(1, adapter))
        model.requires_grad_(False)
        return reply


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in row.items() if name != OPTIONS}, sort_keys=True, default=str)
