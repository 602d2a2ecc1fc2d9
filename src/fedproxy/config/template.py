"""A commented experiment file to begin with."""

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedproxy.config.files import parse_experiment, to_toml
from fedproxy.config.tables import Compress, Federate, Partition, Train

_TASKS = '# tasks = ["arc_easy"]'
_COMMENTS = 40
"""The column at which comments begin."""


def experiment_file(
    llm: str, calibration: str, *, clients: Mapping[str, str], partition: Partition | None, folder: Path
) -> str:
    """The text of an experiment file: what is given, and the keys that most people change.

    Their values are near those that tune SmolLM2, of 135 million parameters (experiments/smollm2/first.toml and
    eight_pairs.toml). The defaults of the keys are the paper's, for 7 billion.

    Args:
        llm: The LLM, a directory or a Hub id.
        calibration: Public text.
        clients: Each client's name → its rows.
        partition: Or one file of rows, divided among clients.
        folder: Where the file will lie. Relative paths, which count from the working directory, are written from there.

    Raises:
        ConfigError: it cannot be used, for example since a path does not exist; all problems are in it.
    """

    def path(given: str) -> str:
        here = Path(given).exists() and not os.path.isabs(given)
        return os.path.relpath(os.path.abspath(given), folder.resolve()) if here else given

    compress = Compress(remove=0.25, samples=128, max_length=128)
    train = Train(batch_size=2, learning_rate=1e-3, lora_r=16, lora_alpha=32, lora_dropout=0.0)
    federate = Federate(rounds=3, validation=0.1)
    tables = [
        _line("name", "experiment"),
        _line("seed", 0, "the same seed gives the same result"),
        "\n[llm]",
        _line("path", path(llm), "a directory or a Hub id"),
        "\n[compress]",
        _line(
            "remove", compress.remove, "share of the LLM's blocks that the proxy lacks; the more, the longer to train"
        ),
        _line("calibration", path(calibration), "public text, by which the blocks are scored"),
        _line("samples", compress.samples, "documents of it"),
        _line("max_length", compress.max_length, "tokens of a document at most"),
        *_clients({name: path(data) for name, data in clients.items()}),
        *([] if partition is None else _partition(partition, path(partition.data))),
        "\n[train]",
        _line("epochs", train.epochs, "over a client's rows, in each round"),
        _line("batch_size", train.batch_size, "rows in a step; few rows are many steps, which a proxy needs"),
        _line("learning_rate", train.learning_rate, "for an LLM of some hundred million parameters; 1e-4 for billions"),
        _line("max_length", train.max_length, "tokens of a row at most; `fedproxy data check` tells what is cut"),
        _line("lora_r", train.lora_r, "rank of the adapter, which is all that travels after the proxy"),
        _line("lora_alpha", train.lora_alpha),
        _line("lora_dropout", train.lora_dropout, "0.1 for many rounds over few rows"),
        _line("assistant_only_loss", train.assistant_only_loss, "true: of a conversation every answer, not the last"),
        "\n[federate]",
        _line("rounds", federate.rounds),
        _line("validation", federate.validation, "share of its rows that a client keeps back, to score each round on"),
        _line("merge", federate.merge, "`fedproxy methods` shows what else there is"),
        _line("regulariser", federate.regulariser),
        "\n# [evaluate]",
        f"{_TASKS:{_COMMENTS}}# tasks of the LM evaluation harness: pip install 'fedproxy[eval]'",
    ]
    text = "\n".join(tables) + "\n"
    parse_experiment(tomllib.loads(text), source="The experiment", folder=folder.resolve())
    return text


def _clients(clients: Mapping[str, str]) -> Iterator[str]:
    for name, data in clients.items():
        yield from ("\n[[client]]", _line("name", name), _line("data", data, "its rows, which never leave it"))


def _partition(partition: Partition, data: str) -> Iterator[str]:
    yield "\n[partition]"
    yield _line("data", data, "rows that are divided, to try a federation on one machine")
    yield _line("clients", partition.clients)
    yield _line("scheme", partition.scheme, '"iid": evenly; "dirichlet": by the column "label", unevenly')


def _line(key: str, value: object, comment: str = "") -> str:
    assignment = f"{key} = {to_toml({'x': value}).strip().removeprefix('x = ')}"
    return f"{assignment:{_COMMENTS - 2}}  # {comment}" if comment else assignment
