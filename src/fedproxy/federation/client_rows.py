"""The rows that clients train on: read, dealt out, and encoded once."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedproxy.config import Client, Evaluate, Experiment, Train
from fedproxy.data import partition, read_rows
from fedproxy.evaluation.rendering import training_rows
from fedproxy.models.checkpoints import Tokenizer, load_config, load_tokenizer
from fedproxy.models.encoding import Encoded, training_examples
from fedproxy.models.families import readable
from fedproxy.models.validating import Validation, encode_validation, labels_of
from fedproxy.seeds import derive_seed

Rows = list[dict[str, Any]]


class ClientRows(Mapping[str, Rows]):
    """Each client's rows by its name, and what they are as tokens, which is found once.

    An LLM and its proxy have one tokenizer: what was encoded for the one need not be for the other.

    Args:
        rows: Name → rows that are trained on.
        held: Name → rows that are kept back, to be scored on; none of a client without.
    """

    def __init__(self, rows: Mapping[str, Rows], held: Mapping[str, Rows] | None = None) -> None:
        self._rows, self.held = dict(rows), dict(held or {})
        self._encoded: dict[tuple[str, int, bool, bool], list[Encoded]] = {}

    def __getitem__(self, name: str) -> Rows:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def whole(self) -> dict[str, list[Rows]]:
        """All rows of each client: those that are trained on, and those that are kept back."""
        return {name: [rows, self.held.get(name, [])] for name, rows in self._rows.items()}

    def examples(self, name: str, tokenizer: Tokenizer, longest: int, train: Train) -> list[Encoded]:
        """A client's rows as tokens; the arguments, and what is raised, are those of `training_examples`."""
        key = (name, longest, train.completion_only_loss, train.assistant_only_loss)
        if key not in self._encoded:
            self._encoded[key] = training_examples(self._rows[name], tokenizer, train, longest)
        return self._encoded[key]

    def validation(self, name: str, tokenizer: Tokenizer, longest: int, train: Train) -> Validation | None:
        """The rows that a client keeps back, as tokens; none of one that keeps none. The arguments are as above."""
        held, most = self.held.get(name), len(self.examples(name, tokenizer, longest, train))
        return scored_rows(self[name], held, most, tokenizer, train, longest) if held else None

    def encoded(self, tokenizer: Tokenizer, experiment: Experiment, longest: int) -> dict[str, list[Encoded]]:
        """Every client's rows as [train] says.

        Args:
            tokenizer: The LLM's.
            experiment: The experiment.
            longest: Tokens of a row at most.
        """
        return {name: self.examples(name, tokenizer, longest, experiment.train) for name in self}

    def validations(self, tokenizer: Tokenizer, experiment: Experiment, longest: int) -> dict[str, Validation]:
        """The rows that clients keep back, of those who keep any; the arguments are as of `encoded`."""
        found = {name: self.validation(name, tokenizer, longest, experiment.train) for name in self}
        return {name: one for name, one in found.items() if one is not None}


def scored_rows(
    rows: Sequence[Mapping[str, Any]],
    held: Sequence[Mapping[str, Any]],
    most: int,
    tokenizer: Tokenizer,
    train: Train,
    longest: int,
) -> Validation:
    """The rows that a client scores on, as the proxy is to read them.

    Args:
        rows: Its training rows; their answers and those of `held` are the labels, if they are few.
        held: The rows that it keeps back, at least one.
        most: So many of these are scored at most: a server believes no score of more rows than are trained on.
        tokenizer: The proxy's.
        train: The [train] table.
        longest: Tokens of a row at most.

    Raises:
        UsageError, ArtifactError: as of `encode`.
    """
    return encode_validation(held[:most], labels_of([*rows, *held]), tokenizer, train, longest)


def _order(rows: Rows, seed: int, purpose: str, client: str) -> list[int]:
    """The places of the rows in an order that seed, purpose and the client's name draw."""
    drawn: list[int] = np.random.default_rng(derive_seed(seed, purpose, client)).permutation(len(rows)).tolist()
    return drawn


def hold_back(rows: Rows, share: float, seed: int, client: str) -> tuple[Rows, Rows]:
    """Part a client's rows into those that are trained on and those that are kept back, each in their order.

    Args:
        rows: The rows.
        share: Share that is kept back, rounded down to whole rows but at least one; 0 for none.
        seed: The experiment's seed; the rows depend on it and the client's name.
        client: The client's name.

    Returns:
        The rows to train on, never none, and those kept back; of a single row nothing is kept back.
    """
    count = min(max(1, int(share * len(rows) + 1e-9)), len(rows) - 1) if share else 0
    held = set(_order(rows, seed, "validation", client)[:count])
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def validation_rows(path: Path, most: int, seed: int, client: str) -> Rows:
    """At most so many rows of a file to be scored on, drawn by the seed and the client's name, in their order.

    Raises:
        ArtifactError: the file cannot be read.
    """
    rows = read_rows(path)
    return [rows[i] for i in sorted(_order(rows, seed, "validation", client)[:most])]


def parted_rows(
    rows: Rows, share: float, seed: int, client: str, *, file: str = "", scores: bool = True
) -> tuple[Rows, Rows]:
    """A client's rows to train on, and those to score on, by what is offered and what it wants itself.

    Args:
        rows: Its rows.
        share: What is offered as [federate] validation; 0 asks for no scores.
        seed: The experiment's seed.
        client: Its name.
        file: A file of rows to score on instead, so that all `rows` are trained on; at most as many as these.
        scores: Whether it gives scores at all; if not, it trains on all its rows.

    Raises:
        ArtifactError: the file cannot be read.
    """
    if not (share and scores):
        return rows, []
    if file:
        return rows, validation_rows(Path(file), len(rows), seed, client)
    return hold_back(rows, share, seed, client)


def rows_of(client: Client, evaluate: Evaluate, seed: int) -> Rows:
    """The rows of a client: its file's, or its task's; at most `client.rows`, chosen by the seed.

    Raises:
        ArtifactError: the file or task cannot be read.
        UsageError: the task is unknown, or has code that is not trusted.
    """
    if client.task:
        return training_rows(
            client.task,
            data=evaluate.data or None,
            include=evaluate.include or None,
            trust_tasks=evaluate.trust_tasks,
            limit=client.rows,
            seed=seed,
            options=True,
        )
    rows = read_rows(Path(client.data))
    if client.rows is None or client.rows >= len(rows):
        return rows
    return [rows[i] for i in _order(rows, seed, "rows", client.name)[: client.rows]]


def client_rows(experiment: Experiment) -> ClientRows:
    """The rows of every client, those parted off that [federate] validation keeps back.

    Raises:
        ArtifactError: a data file or task cannot be read.
        UsageError: a task is unknown or has code that is not trusted, or the partition is impossible.
    """
    cut, seed, share = experiment.partition, experiment.seed, experiment.federate.validation
    if cut is None:
        found = _own_rows(experiment)
    else:
        rows = rows_of(Client("partition", cut.data, cut.task, cut.rows), experiment.evaluate, seed)
        parts = partition(rows, cut.clients, cut.scheme, cut.alpha, seed)
        found = dict(zip(experiment.client_names, parts, strict=True))
    parted = {name: hold_back(rows, share, seed, name) for name, rows in found.items()}
    return ClientRows(
        {name: rows for name, (rows, _) in parted.items()}, {name: held for name, (_, held) in parted.items() if held}
    )


def _own_rows(experiment: Experiment) -> dict[str, Rows]:
    """The rows of clients with a file or task each; what several draw of one task are consecutive parts of one draw."""
    evaluate, seed = experiment.evaluate, experiment.seed
    wanted, begin, drawn, found = Counter[str](), Counter[str](), dict[str, Rows](), dict[str, Rows]()
    for client in experiment.client:
        wanted[client.task] += client.rows or 0
    for client in experiment.client:
        if not client.task or client.rows is None:
            found[client.name] = rows_of(client, evaluate, seed)
            continue
        if client.task not in drawn:
            drawn[client.task] = rows_of(replace(client, rows=wanted[client.task]), evaluate, seed)
        rows, first = drawn[client.task], begin[client.task]
        begin[client.task] += client.rows
        found[client.name] = [rows[i % len(rows)] for i in range(first, first + min(client.rows, len(rows)))]
    return found


def encode_for(model: Path, rows: ClientRows, experiment: Experiment) -> tuple[Tokenizer, dict[str, list[Encoded]]]:
    """The tokenizer of a checkpoint, and every client's rows, encoded as its model is to read them."""
    trust = experiment.llm.trust_remote_code
    tokenizer = load_tokenizer(model, trust_remote_code=trust)
    longest = readable(load_config(model, trust_remote_code=trust), experiment.train.max_length)
    return tokenizer, rows.encoded(tokenizer, experiment, longest)
