"""The experiment file: TOML read into tables, every problem of it reported at once, and tables written as TOML."""

import dataclasses
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedproxy.config import tables
from fedproxy.config.checked import read_table
from fedproxy.config.experiment import Experiment, map_paths
from fedproxy.config.privacy import unprivate
from fedproxy.config.tables import VARIED, Client, Variant
from fedproxy.errors import ArtifactError, ConfigError
from fedproxy.registry import axis

_BARE = re.compile(r"[A-Za-z0-9_-]+")
"""Keys of TOML that need no quotes."""
_ONCE = (tables.LLM, tables.Compress, tables.Heal, tables.Train, tables.Federate, tables.Fuse, tables.Evaluate)
_TABLES: dict[str, type] = {kind.__name__.lower(): kind for kind in (*_ONCE, tables.Partition, tables.Compare)}


def parse_experiment(raw: dict[str, Any], *, source: str, folder: Path, remote: bool = False) -> Experiment:
    """Build an experiment from parsed TOML.

    Args:
        raw: The parsed file.
        source: What to call it in errors.
        folder: The folder that relative paths count from.
        remote: The clients are elsewhere: their data need not be here, and their names need not be known.

    Raises:
        ConfigError: anything is wrong; all problems are in it.
    """

    def resolved(where: str, path: str) -> str:
        found = folder / os.path.expanduser(path)
        return path if where == "[llm] path" and not found.exists() else str(found.resolve())

    problems: list[str] = []
    values = {"llm": {}, "compress": {}} | map_paths(raw, resolved)
    if "client" in values:
        values["client"] = _tables(Client, values["client"], "client", problems)
    if isinstance(compare := values.get("compare"), dict) and "variant" in compare:
        variants = _tables(Variant, compare["variant"], "compare.variant", problems)
        values["compare"] = {**compare, "variant": variants}
    for name in _TABLES.keys() & values.keys():
        values[name] = read_table(_TABLES[name], values[name], name, problems)
    experiment = read_table(Experiment, values, "", problems)
    problems += [*_missing(experiment, remote), *clashes(experiment)]
    if problems:
        raise ConfigError(source, problems)
    return experiment


def _tables(kind: type[Any], values: Any, where: str, problems: list[str]) -> tuple[Any, ...]:
    if not isinstance(values, list):
        problems.append(f"[[{where}]] must be written with double brackets, one table each.")
        return ()
    return tuple(read_table(kind, one, f"{where} {number}", problems) for number, one in enumerate(values, 1))


def _missing(experiment: Experiment, remote: bool) -> Iterator[str]:
    """What an experiment needs before it can run: clients with data, and files that exist."""
    if not experiment.llm.path:
        yield '[llm] needs path = "a directory or a Hub id".'
    if not experiment.compress.calibration:
        yield "[compress] needs calibration = FILE with public text."
    if not experiment.client and not experiment.partition and not remote:
        yield "There are no clients: add [[client]] tables or a [partition]."
    for number, client in enumerate(experiment.client, 1):
        if not client.name:
            yield f"[client {number}] needs a name."
        if bool(client.data) == bool(client.task) and not remote:
            yield f"[client {number}] needs either data = FILE or task = NAME."
    cut = experiment.partition
    if cut is not None and bool(cut.data) == bool(cut.task):
        yield "[partition] needs either data = FILE or task = NAME."
    for where, path in experiment.paths.items():
        if where != "[llm] path" and not (remote and where.startswith("[client ")) and not Path(path).exists():
            yield f"{where}: {path} does not exist."


def clashes(experiment: Experiment) -> list[str]:
    """What of an experiment's tables does not go together, as they are and as each variant of [compare] has them."""
    own = list(_clashes(experiment))
    return [*own, *_variant_problems(experiment, own)]


def _clashes(experiment: Experiment) -> Iterator[str]:
    clients, cut, rank = experiment.client, experiment.partition, experiment.train.lora_r
    spaces = axis("fedproxy.spaces")
    if clients and cut is not None:
        yield "[[client]] and [partition] exclude each other; keep one."
    names = [client.name for client in clients]
    for name in sorted({name for name in names if name and names.count(name) > 1}):
        yield f'Two clients are called "{name}"; names must differ.'
    if (experiment.fuse.scale == "auto") != bool(experiment.fuse.public):
        yield '[fuse] scale = "auto" and public = FILE need each other.'
    quorum, count = experiment.federate.quorum, len(clients) if cut is None else cut.clients
    if isinstance(quorum, int) and 0 < count < quorum:
        yield (
            f"[federate] quorum = {quorum}: there are {count} clients. Write a number of replies, or a share with a "
            "decimal point."
        )
    yield from _unscored(experiment)
    yield from unprivate(experiment.train, experiment.federate)
    for number, client in enumerate(clients, 1):
        own = client.lora_r or rank
        if own != rank and spaces[experiment.federate.space].for_rank is None:
            fitting = ", ".join(name for name, space in spaces.items() if space.for_rank)
            yield f"[client {number}] lora_r = {own}: clients' ranks may differ in these spaces only: {fitting}."
        if own > rank:
            yield f"[client {number}] lora_r = {own}: must be at most that of [train], {rank}."


def _unscored(experiment: Experiment) -> Iterator[str]:
    """Settings of [federate] that need the clients' scores and have none."""
    federate = experiment.federate
    wanted = {'keep = "best"': federate.keep == "best", "patience_rounds": federate.patience_rounds > 0}
    for key, set_ in {**wanted, "alone": federate.alone}.items():
        if set_ and not federate.validation:
            yield f"[federate] {key} goes by the clients' validation rows: set validation, as in validation = 0.1."
    if federate.keep == "best" and experiment.heal.realign_steps:
        yield '[federate] keep = "best": with [heal] realign_steps each round has another proxy; keep the last.'


def _variant_problems(experiment: Experiment, known: list[str]) -> Iterator[str]:
    """What is wrong with the variants of [compare]: their names, what they set, and that beside the rest."""
    variants = experiment.compare.variant if experiment.compare else ()
    methods, names = axis("fedproxy.methods"), [one.name for one in variants]
    for number, one in enumerate(variants, 1):
        where = f"[compare.variant {number}]"
        if not one.name or not one.method:
            yield f"{where} needs a name and a method."
        elif one.name in methods or one.name in names[: number - 1]:
            yield f'{where} name = "{one.name}": another method is called so.'
        if "remove" in one.compress:
            yield f"{where} sets compress.remove: [compare] ratios does."
        if not one.settings:
            yield f"{where} sets nothing: give it keys of {', '.join(VARIED)}."
        tables = {name: dataclasses.replace(getattr(experiment, name), **keys) for name, keys in one.settings.items()}
        for problem in _clashes(dataclasses.replace(experiment, **tables)):
            if problem not in known:
                yield f'variant "{one.name}": {problem}'


def load_experiment(path: Path, *, remote: bool = False) -> Experiment:
    """Read and check an experiment file; `remote` is that of `parse_experiment`.

    Raises:
        ArtifactError: the file cannot be read.
        ConfigError: anything in it is wrong; all problems are in the error.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(str(path), [f"It is not valid TOML: {error}."]) from error
    return parse_experiment(raw, source=str(path), folder=path.resolve().parent, remote=remote)


def to_toml(values: dict[str, Any]) -> str:
    """Write a resolved experiment (`Experiment.as_dict`) as TOML."""

    def literal(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, str):
            escaped = "".join("\\" + c if c in '"\\' else (c if c.isprintable() else f"\\U{ord(c):08x}") for c in value)
            return f'"{escaped}"'
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(literal(v) for v in value) + "]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{literal(str(k))} = {literal(v)}" for k, v in value.items()) + "}"
        return repr(value)

    def key(name: object) -> str:
        return str(name) if _BARE.fullmatch(str(name)) else literal(str(name))

    lines = [f"{key(k)} = {literal(v)}" for k, v in values.items() if not isinstance(v, (dict, list))]
    for name, table in values.items():
        for entry in table if isinstance(table, list) else [table] if isinstance(table, dict) else []:
            lines += ["", f"[[{key(name)}]]" if isinstance(table, list) else f"[{key(name)}]"]
            lines += [f"{key(k)} = {literal(v)}" for k, v in entry.items()]
    return "\n".join(lines) + "\n"
