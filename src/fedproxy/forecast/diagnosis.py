"""Whether an experiment can be run here: each thing that it needs is looked at, whatever the others are like."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from fedproxy.config import Client, Experiment
from fedproxy.errors import ConfigError, FedproxyError, UsageError
from fedproxy.evaluation.experiment import check_tasks, scored_tasks
from fedproxy.federation.client_rows import Rows, client_rows, rows_of
from fedproxy.federation.fitting import check_fit
from fedproxy.forecast.known import Known
from fedproxy.models.encoding import training_examples
from fedproxy.pipeline import read_experiment
from fedproxy.public_text import read_documents

Finding = tuple[str, str | FedproxyError]
"""What was looked at, and what was found: a few words, or what is wrong with it."""


def diagnose(path: Path) -> Iterator[Finding]:
    """Look at an experiment file, and at the LLM, the texts, the rows and the tasks that it names, one by one.

    Returns:
        A finding for each; if the file itself cannot be used, one for each of its problems, and no other.
    """
    try:
        experiment = read_experiment(path)
    except ConfigError as error:
        yield from ((str(path), UsageError(problem)) for problem in error.problems)
        return
    except FedproxyError as error:
        yield str(path), error
        return
    yield str(path), f"an experiment called {experiment.name}"
    known: list[Known] = []
    yield _tried(f"LLM {experiment.llm.path}", functools.partial(_llm, experiment, known))
    for text in {experiment.compress.calibration, experiment.heal.text, experiment.fuse.public} - {""}:
        yield _tried(f"public text {text}", functools.partial(_documents, text))
    for client in experiment.client:
        read: Callable[[], Rows] = functools.partial(rows_of, client, experiment.evaluate, experiment.seed)
        yield _tried(_owned(client), functools.partial(_rows, read, experiment, known))
    if experiment.partition is not None:
        source = experiment.partition.data or experiment.partition.task
        yield _tried(f"rows of {source}", functools.partial(_rows, lambda: _divided(experiment), experiment, known))
    if tasks := scored_tasks(experiment):
        yield _tried(f"tasks {', '.join(tasks)}", functools.partial(_tasks, experiment))


def _tried(what: str, look: Callable[[], str]) -> Finding:
    try:
        return what, look()
    except FedproxyError as error:
        return what, error


def _llm(experiment: Experiment, known: list[Known]) -> str:
    found = Known(experiment)
    check_fit(experiment, found.shape.decoder)
    known.append(found)
    return f"{found.shape.count} blocks, {found.shape.parameters:,} parameters"


def _documents(text: str) -> str:
    return f"{len(read_documents(Path(text))[0]):,} documents"


def _tasks(experiment: Experiment) -> str:
    check_tasks(experiment)
    return "all there"


def _owned(client: Client) -> str:
    return f"client {client.name}, {client.data or client.task}"


def _divided(experiment: Experiment) -> Rows:
    return [row for rows in client_rows(experiment).values() for row in rows]


def _rows(read: Callable[[], Rows], experiment: Experiment, known: list[Known]) -> str:
    rows = read()
    if not known:  # which is a finding of its own
        return f"{len(rows):,} rows"
    longest = known[0].readable(experiment.train.max_length)
    examples = training_examples(rows, known[0].tokenizer, experiment.train, longest)
    cut = sum(example.cut for example in examples)
    return f"{len(rows):,} rows, {sum(len(example.ids) for example in examples):,} tokens, {cut:,} rows cut"
