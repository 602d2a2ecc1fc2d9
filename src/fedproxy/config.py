"""The experiment file: one frozen dataclass a table; every problem of the file is reported at once."""

import dataclasses
import difflib
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fedproxy.errors import ArtifactError, ConfigError

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h)")
CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAME_SAYS = "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
_UNIT_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def limited(default: Any, rule: Callable[[Any], bool], says: str) -> Any:
    """A dataclass field whose value must satisfy `rule`; `says` completes the sentence 'must be ...'."""
    return field(default=default, metadata={"rule": rule, "says": says})


def _positive(default: Any) -> Any:
    return limited(default, lambda v: v > 0, "greater than 0")


def _not_negative(default: Any) -> Any:
    return limited(default, lambda v: v >= 0, "0 or more")


def _share(default: float) -> Any:
    return limited(default, lambda v: 0 <= v < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class LLM:
    """[llm]: the model owner's checkpoint, a directory or a Hub id; its own Python code runs only if trusted."""

    path: str = ""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Compress:
    """[compress]: how the LLM becomes the proxy (DESIGN Eq. 4).

    Attributes:
        remove: Share of the LLM's blocks that is removed, rounded down to whole blocks; above 0 at least one must go.
        score: Name of the score of the blocks.
        keep_first: Blocks at the beginning of the LLM that are kept whatever they score.
        keep_last: Blocks at its end, likewise.
        calibration: Public text to score the blocks on.
        samples: Documents drawn from it.
        max_length: Tokens of a document at most.
        batch_size: Documents in one forward pass.
        placement: Where the LLM is run: "memory", "stream" (one block at a time from its files), or "auto".
    """

    remove: float = _share(0.5)
    score: str = "block-influence"
    keep_first: int = _not_negative(0)
    keep_last: int = _not_negative(0)
    calibration: str = ""
    samples: int = _positive(512)
    max_length: int = limited(512, lambda v: v >= 2, "2 or more")
    batch_size: int = _positive(8)
    placement: Literal["auto", "memory", "stream"] = "auto"


HEALING_RATES = {"lora": 5e-4, "full": 1e-4}
"""Learning rate of each mode of healing where none is given."""


@dataclass(frozen=True)
class Heal:
    """[heal]: the LLM teaches the proxy on public text; with 0 steps it does not.

    Attributes:
        steps: Optimizer steps.
        mode: "lora" trains a low-rank change of the blocks and merges it, "full" all weights of the blocks.
        learning_rate: Highest learning rate; the mode's own if none.
        batch_size: Documents in a step.
        max_length: Tokens of a document at most.
        temperature: Both models' logits are divided by it.
        hidden_weight: Weight of the hidden states' distance beside the divergence of the predictions; with 0 no hidden
            states are kept, which take nearly all of the disk space.
        top_k: How many of the LLM's likeliest next tokens are kept for each token.
        text: Public text; the calibration text if empty.
        held_out: Documents that are not trained on, to measure perplexity on; at most a quarter of all.
        lora_r: Rank in mode "lora".
        save_every: Steps between two savings of the state that a killed run goes on from.
        spare_ends: Whether the blocks that [compress] keep_first and keep_last name stay as they are in the LLM.
        realign_steps: Steps of the same teaching before every round but the first, now of the LLM with what the clients
            learned so far plugged in, for the proxy blocks that [train] blocks leaves out. Engine inline only.
    """

    steps: int = _not_negative(0)
    mode: Literal["lora", "full"] = "lora"
    learning_rate: float | None = _positive(None)
    batch_size: int = _positive(8)
    max_length: int = limited(512, lambda v: v >= 2, "2 or more")
    temperature: float = _positive(2.0)
    hidden_weight: float = _not_negative(1.0)
    top_k: int = _positive(64)
    text: str = ""
    held_out: int = _positive(64)
    lora_r: int = _positive(64)
    save_every: int = _positive(50)
    spare_ends: bool = False
    realign_steps: int = _not_negative(0)

    @property
    def highest_rate(self) -> float:
        """The learning rate given, or the mode's."""
        return self.learning_rate or HEALING_RATES[self.mode]


@dataclass(frozen=True)
class Client:
    """[[client]]: a data owner, with a JSON Lines file (`data`) or a task of the LM evaluation harness (`task`).

    Attributes:
        name: Its name.
        data: Its rows in TRL's formats: {"prompt", "completion"}, strings or lists of messages (the completion one
            message, the answer), {"messages"}, of which the last is the answer, or {"text"}.
        task: Or a task.
        rows: At most so many of them, chosen by the seed; clients of one task draw different ones while they last.
        lora_r: Rank of its adapter, if not that of [train]; in the space "product" clients' ranks may differ. The
            scaling lora_alpha / lora_r stays that of [train].
    """

    name: str = ""
    data: str = ""
    task: str = ""
    rows: int | None = _positive(None)
    lora_r: int | None = _positive(None)


@dataclass(frozen=True)
class Partition:
    """[partition]: a JSON Lines file (`data`) or a task (`task`) cut into clients, instead of [[client]].

    Attributes:
        data: The rows.
        task: Or a task.
        rows: At most so many of them, chosen by the seed.
        clients: Number of clients.
        scheme: "iid" deals the rows out evenly, "dirichlet" each label unevenly: the field "label" of the rows, else
            the answer, of which there may be half as many different ones as there are rows.
        alpha: Concentration of the Dirichlet distribution: the smaller, the fewer labels a client sees.
    """

    data: str = ""
    task: str = ""
    rows: int | None = _positive(None)
    clients: int = _positive(8)
    scheme: Literal["iid", "dirichlet"] = "dirichlet"
    alpha: float = _positive(0.5)


TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""Trackers that accelerate knows."""


@dataclass(frozen=True)
class Train:
    """[train]: local training. Names that SFTConfig has too mean the same here.

    Attributes:
        max_length: Tokens of a row at most, and no more than the model has positions for.
        lr_scheduler_type: How the learning rate goes on after the warm-up. It begins anew in each round.
        warmup_steps: Steps, of each round, in which the learning rate rises from 0, the first step's; also in
            "constant". A round of one step with a warm-up changes nothing.
        blocks: Which blocks of the proxy train: "all", or their numbers, of which negative ones count from the end, as
            in [0, 1, -2, -1] for the first and the last two.
        report_to: Trackers that are told the loss of every step and the numbers of every round, by the server; of
            clients elsewhere it knows the rounds only. Files, such as those of "tensorboard", go to RUN/tracking; to a
            service go the clients' names, too.
    """

    epochs: float = _positive(1.0)
    max_steps: int | None = _positive(None)
    batch_size: int = _positive(16)
    gradient_accumulation_steps: int = _positive(1)
    gradient_checkpointing: bool = False
    learning_rate: float = _positive(5e-5)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = _not_negative(0)
    weight_decay: float = _not_negative(0.0)
    adam_beta1: float = _share(0.9)
    adam_beta2: float = _share(0.999)
    adam_epsilon: float = _positive(1e-8)
    max_grad_norm: float = _positive(1.0)
    max_length: int = limited(512, lambda v: v >= 2, "2 or more")
    completion_only_loss: bool = True
    group_by_length: bool = True
    padding_free: bool = True
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    quantization: Literal["none", "4bit"] = "none"
    lora_r: int = _positive(32)
    lora_alpha: float = _positive(64.0)
    lora_dropout: float = _share(0.1)
    lora_targets: str | list[str] = "all-linear"
    blocks: Literal["all"] | list[int] = field(
        default="all", metadata={"rule": lambda v: len(v) > 0, "says": '"all", or at least one number'}
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata={"rule": lambda v: set(v) <= set(TRACKERS), "says": "some of " + ", ".join(TRACKERS)},
    )


def _duration(default: str, optional: bool = False) -> Any:
    says = 'a duration such as "30m"' + ', or "" for none' * optional
    return limited(default, lambda v: DURATION.fullmatch(v) is not None or (optional and not v), says)


def _quorum(value: float) -> bool:
    return value >= 1 if isinstance(value, int) else 0 < value <= 1


@dataclass(frozen=True)
class Federate:
    """[federate]: rounds, merge rule (Eq. 5-7, 10-14), client regulariser (Eq. 8-9), and what a round may lack.

    Attributes:
        rounds: Number of rounds.
        merge: Name of the merge rule.
        merge_options: Its options, and `clip_norm`, which any rule takes.
        space: What is merged: the "factors" A and B as published, their "product" B·A, or B alone on a "frozen-a".
        server_optimizer: What makes of the merged update the step of the global adapter.
        server_options: Its options.
        regulariser: Name of the clients' regulariser.
        regulariser_strength: Its strength; the regulariser's own if none.
        wire: Encoding of the clients' updates; what it loses a client adds to its next update (error feedback).
        wire_options: Its options.
        wire_down: Encoding of the global adapter on its way to the clients.
        participation: Share of the clients that a round asks, chosen by the seed; at least a quorum.
        quorum: Valid replies that a round needs: as 0.75 or 1.0 a share of the clients that a full round asks, as 3 or
            1 a number of replies.
        deadline: Time that the clients of a round have; "" for as long as it takes.
        retries: How often a round without a quorum is repeated before the run ends.
        patience: How long the first round waits for all its clients, and any round for a quorum of them.
        max_norm: Largest Euclidean norm of an update; none if any is taken.
        max_norm_ratio: Largest norm of an update, in medians of the round's norms (from three replies on).
        strikes: Invalid replies over the run after which a client is not asked again.
        keep_rounds: Rounds whose adapter and conflict are kept on disk; 0 keeps all.
    """

    rounds: int = _positive(10)
    merge: str = "h-ties"
    merge_options: dict[str, Any] = field(default_factory=dict)
    space: str = "factors"
    server_optimizer: str = "none"
    server_options: dict[str, Any] = field(default_factory=dict)
    regulariser: str = "pcr"
    regulariser_strength: float | None = _not_negative(None)
    wire: str = "fp32"
    wire_options: dict[str, Any] = field(default_factory=dict)
    wire_down: str = "fp32"
    participation: float = limited(1.0, lambda v: 0 < v <= 1, "above 0 and at most 1")
    quorum: int | float = limited(
        0.75, _quorum, "a share above 0.0 and up to 1.0 of the clients asked, or a whole number of replies from 1 on"
    )
    deadline: str = _duration("", optional=True)
    retries: int = _not_negative(2)
    patience: str = _duration("10m")
    max_norm: float | None = _positive(None)
    max_norm_ratio: float = limited(10.0, lambda v: v > 1, "greater than 1")
    strikes: int = _positive(3)
    keep_rounds: int = _not_negative(0)


@dataclass(frozen=True)
class Fuse:
    """[fuse]: plug what was learned back into the LLM (Eq. 15); scale "auto" is chosen by loss on the text `public`.

    Attributes:
        scale: Factor of the task vector; "auto" is for public text like the tasks': other text favours small ones.
        public: The text that "auto" looks at.
    """

    scale: float | Literal["auto"] = limited(
        1.0, lambda v: v == "auto" or math.isfinite(v), 'a finite number or "auto"'
    )
    public: str = ""


@dataclass(frozen=True)
class Evaluate:
    """[evaluate]: tasks of the LM evaluation harness; left out, those of the clients."""

    tasks: list[str] = field(default_factory=list)
    data: str = ""
    include: str = ""
    limit: int | None = _positive(None)
    batch_size: int = _positive(64)
    centralized: bool = False
    models: list[str] = field(default_factory=lambda: ["llm", "proxy", "proxy_tuned", "fused"])


@dataclass(frozen=True)
class Variant:
    """[[compare.variant]]: a method with settings of its own, compared as one more method.

    Attributes:
        name: What it is called: 1 to 64 letters, digits, ".", "_" or "-"; not the name of a method.
        method: The method that it varies.
        compress: Keys of [compress] that it sets, but for `remove`, which `ratios` varies.
        heal: Keys of [heal].
        train: Keys of [train].
        federate: Keys of [federate]; of a method without a federation only those that say how much is trained.
        fuse: Keys of [fuse].
    """

    name: str = ""
    method: str = ""
    compress: dict[str, Any] = field(default_factory=dict)
    heal: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    federate: dict[str, Any] = field(default_factory=dict)
    fuse: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What it sets: table → key → value."""
        return {name: values for name in VARIED if (values := getattr(self, name))}


VARIED = ("compress", "heal", "train", "federate", "fuse")
"""The tables that a variant sets keys of."""


@dataclass(frozen=True)
class Compare:
    """[compare]: which methods `fedproxy compare` sets side by side on the same work.

    Attributes:
        methods: Their names; all if empty. The variants come beside them.
        seeds: Every method runs with each of these seeds, in place of the experiment's own.
        ratios: And removes each of these shares of the LLM's blocks, in place of [compress] remove; if empty, that one.
    """

    methods: list[str] = field(default_factory=list)
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={
            "rule": lambda v: v and min(v) >= 0 and len(set(v)) == len(v),
            "says": "at least one number, each 0 or more and given once",
        },
    )
    ratios: list[float] = field(
        default_factory=list,
        metadata={
            "rule": lambda v: all(0 <= ratio < 1 for ratio in v) and len(set(v)) == len(v),
            "says": "shares of at least 0 and below 1, each given once",
        },
    )
    variant: tuple[Variant, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """The whole experiment file. Relative paths count from the folder of the file."""

    llm: LLM
    compress: Compress
    client: tuple[Client, ...] = ()
    partition: Partition | None = None
    name: str = "experiment"
    seed: int = _not_negative(0)
    heal: Heal = field(default_factory=Heal)
    train: Train = field(default_factory=Train)
    federate: Federate = field(default_factory=Federate)
    fuse: Fuse = field(default_factory=Fuse)
    evaluate: Evaluate = field(default_factory=Evaluate)
    compare: Compare | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each client's adapter that has not that of [train]."""
        return {c.name: c.lora_r for c in self.client if c.lora_r not in (None, self.train.lora_r)}

    def train_of(self, client: str) -> Train:
        """[train] as it is for a client: its own rank, at the common scaling lora_alpha / lora_r."""
        rank = self.ranks.get(client)
        if rank is None:
            return self.train
        alpha = self.train.lora_alpha * rank / self.train.lora_r
        return dataclasses.replace(self.train, lora_r=rank, lora_alpha=alpha)

    @property
    def inputs(self) -> list[str]:
        """The files and directories that it reads, or the Hub id of its LLM."""
        record, found = self.as_dict(), []
        for values in (record, *record.get("compare", {}).get("variant", ())):
            for name, keys in _PATHS.items():
                tables = values.get(name, [])
                for table in tables if isinstance(tables, list) else [tables]:
                    found += [table[key] for key in keys if table.get(key)]
        return found

    def as_dict(self) -> dict[str, Any]:
        """The resolved experiment as plain values, without what is not set."""
        return typing.cast("dict[str, Any]", _without_none(dataclasses.asdict(self)))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(v) for v in value]
    return value


_PATHS = {
    "llm": ("path",),
    "compress": ("calibration",),
    "heal": ("text",),
    "client": ("data",),
    "partition": ("data",),
    "evaluate": ("data", "include"),
    "fuse": ("public",),
}
"""Table → keys whose values are paths once an experiment is resolved."""


def from_folder(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`Experiment.as_dict` with its paths counted from a folder: the same wherever the folder lies.

    Args:
        values: The resolved experiment as plain values.
        folder: The folder, absolute; usually that of the experiment file.
    """

    def moved(keys: typing.Collection[str], table: dict[str, Any]) -> dict[str, Any]:
        return {
            key: os.path.relpath(value, folder) if key in keys and os.path.isabs(value) else value
            for key, value in table.items()
        }

    found = dict(values)
    for name, keys in _PATHS.items():
        if isinstance(table := values.get(name), list):
            found[name] = [moved(keys, one) for one in table]
        elif table is not None:
            found[name] = moved(keys, table)
    if (asked := values.get("compare")) is not None:
        found["compare"] = {**asked, "variant": [from_folder(one, folder) for one in asked.get("variant", [])]}
    return found


def seconds(text: str) -> float:
    """Read a duration such as "30m", "90 s" or "1.5h" as seconds.

    Raises:
        ValueError: `text` is no duration.
    """
    match = DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'{text!r} is no duration; write for example "90s", "30m" or "2h"')
    return float(match[1]) * _UNIT_SECONDS[match[2]]


def _fits(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a TOML value has the annotated type, and the value as that type."""
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind), value
    if origin in (types.UnionType, typing.Union):
        for option in get_args(kind):
            good, converted = _fits(value, option)
            if good:
                return True, converted
        return False, value
    if origin is list:
        return isinstance(value, list) and all(_fits(v, get_args(kind)[0])[0] for v in value), value
    if origin is dict:
        return isinstance(value, dict), value
    if kind is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        return good, float(value) if good else value
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, kind), value


def _type_name(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(repr(v) for v in get_args(kind))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(v) for v in get_args(kind) if v is not type(None))
    if origin is list:
        return f"a list of {_type_name(get_args(kind)[0])}s"
    names = {str: "string", int: "whole number", float: "number", bool: "true or false", dict: "table"}
    return names.get(origin or kind, str(kind))


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """' Did you mean "x"?' if one of `known` is close to `word`, else ''."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f' Did you mean "{close[0]}"?' if close else ""


def read_table(kind: type, values: Any, where: str, problems: list[str]) -> Any:
    """Build one dataclass from one table, adding to `problems` whatever is wrong with it; what is wrong is left out.

    Args:
        kind: The dataclass, whose every field has a default.
        values: The table.
        where: Its name, for the problems.
        problems: One sentence is added for each.
    """
    if not isinstance(values, dict):
        problems.append(f"[{where}] must be a table.")
        return kind()
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    found = {}
    for key, value in values.items():
        if key not in fields:
            problems.append(f'[{where}] has no key "{key}".{did_you_mean(key, fields)}')
            continue
        good, converted = _fits(value, hints[key])
        if not good:
            problems.append(f"[{where}] {key} = {value!r}: must be {_type_name(hints[key])}.")
            continue
        rule = fields[key].metadata.get("rule")
        if rule is not None and not (isinstance(converted, float) and math.isnan(converted)) and not rule(converted):
            problems.append(f"[{where}] {key} = {value!r}: must be {fields[key].metadata['says']}.")
            continue
        if isinstance(converted, float) and not math.isfinite(converted):
            problems.append(f"[{where}] {key} = {value!r}: must be a finite number.")
            continue
        found[key] = converted
    return kind(**found)


_TABLES: dict[str, type] = {
    "llm": LLM,
    "compress": Compress,
    "heal": Heal,
    "train": Train,
    "federate": Federate,
    "fuse": Fuse,
    "evaluate": Evaluate,
}
_TOP = {"name": str, "seed": int}
_MODELS = ("llm", "proxy", "proxy_tuned", "fused", "proxy_tuning")


def _clients(raw: dict[str, Any], problems: list[str], remote: bool) -> tuple[tuple[Client, ...], Partition | None]:
    tables = raw.get("client", [])
    if not isinstance(tables, list):
        problems.append("[[client]] must be written with double brackets, one table per client.")
        tables = []
    clients = tuple(read_table(Client, t, f"client {i}", problems) for i, t in enumerate(tables, 1))
    partition = read_table(Partition, raw["partition"], "partition", problems) if "partition" in raw else None
    if clients and partition:
        problems.append("[[client]] and [partition] exclude each other; keep one.")
    if not clients and not partition and not remote:
        problems.append("There are no clients: add [[client]] tables or a [partition].")
    for number, client in enumerate(clients, 1):
        if not CLIENT_NAME.fullmatch(client.name):
            problems.append(f"[client {number}] name = {client.name!r}: must be {_NAME_SAYS}.")
        if bool(client.data) == bool(client.task) and not remote:
            problems.append(f"[client {number}] needs either data = FILE or task = NAME.")
    names = [client.name for client in clients]
    for name in sorted({n for n in names if names.count(n) > 1}):
        problems.append(f'Two clients are called "{name}"; names must differ.')
    if partition is not None and bool(partition.data) == bool(partition.task):
        problems.append("[partition] needs either data = FILE or task = NAME.")
    return clients, partition


def _compare(raw: Any, methods: typing.Collection[str], problems: list[str]) -> Compare:
    """Read [compare]; what the variants set is not looked at yet."""
    variants = raw.get("variant", []) if isinstance(raw, dict) else []
    if not isinstance(variants, list):
        problems.append("[[compare.variant]] must be written with double brackets, one table per variant.")
        variants = []
    rest = {key: value for key, value in raw.items() if key != "variant"} if isinstance(raw, dict) else raw
    compare: Compare = read_table(Compare, rest, "compare", problems)
    read = [read_table(Variant, table, f"compare.variant {i}", problems) for i, table in enumerate(variants, 1)]
    named = [("[compare] methods", name) for name in compare.methods]
    named += [(f"[compare.variant {i}] method", one.method) for i, one in enumerate(read, 1)]
    problems += [
        f'{where}: there is no "{name}"; choose from {", ".join(methods)}.{did_you_mean(name, methods)}'
        for where, name in named
        if methods and name not in methods
    ]
    names = [one.name for one in read]
    for number, one in enumerate(read, 1):
        if not CLIENT_NAME.fullmatch(one.name):
            problems.append(f"[compare.variant {number}] name = {one.name!r}: must be {_NAME_SAYS}.")
        if one.name in methods or one.name in names[: number - 1]:
            problems.append(f'[compare.variant {number}] name = "{one.name}": another method is called so.')
        if "remove" in one.compress:
            problems.append(f"[compare.variant {number}] sets compress.remove: [compare] ratios does.")
        if not one.settings:
            problems.append(f"[compare.variant {number}] sets nothing: give it keys of {', '.join(VARIED)}.")
    return dataclasses.replace(compare, variant=tuple(read))


def parse_experiment(
    raw: dict[str, Any],
    *,
    source: str,
    folder: Path,
    choices: Mapping[str, typing.Collection[str]] | None = None,
    remote: bool = False,
) -> Experiment:
    """Build an experiment from parsed TOML.

    Args:
        raw: The parsed file.
        source: What to call it in errors.
        folder: The folder that relative paths count from.
        choices: Names that are registered for `score`, `merge`, `space`, `server_optimizer`, `regulariser`, `wire`,
            `wire_down` and `methods`.
        remote: The clients are elsewhere: their data need not be here, and their names need not be known.

    Raises:
        ConfigError: anything is wrong; all problems are in it.
    """
    problems: list[str] = []
    known = {*_TABLES, *_TOP, "client", "partition", "compare"}
    for key in raw:
        if key not in known:
            problems.append(f'There is no table or key "{key}".{did_you_mean(key, known)}')
    top: dict[str, Any] = {}
    for key, kind in _TOP.items():
        if key in raw:
            good, top[key] = _fits(raw[key], kind)
            if not good or (key == "seed" and raw[key] < 0):
                problems.append(f"{key} = {raw[key]!r}: must be a {_type_name(kind)}{', 0 or more' * (key == 'seed')}.")
    tables = {key: read_table(kind, raw.get(key, {}), key, problems) for key, kind in _TABLES.items()}
    clients, partition = _clients(raw, problems, remote)
    methods = (choices or {}).get("methods", ())
    compare = _compare(raw["compare"], methods, problems) if "compare" in raw else None

    def resolve(path: str) -> str:
        return str((folder / os.path.expanduser(path)).resolve()) if path else ""

    if not tables["llm"].path:
        problems.append('[llm] needs path = "a directory or a Hub id".')
    elif (folder / os.path.expanduser(tables["llm"].path)).exists():
        tables["llm"] = dataclasses.replace(tables["llm"], path=resolve(tables["llm"].path))
    if not tables["compress"].calibration:
        problems.append("[compress] needs calibration = FILE with public text.")
    tables["compress"] = dataclasses.replace(tables["compress"], calibration=resolve(tables["compress"].calibration))
    tables["heal"] = dataclasses.replace(tables["heal"], text=resolve(tables["heal"].text))
    evaluate = tables["evaluate"]
    tables["evaluate"] = dataclasses.replace(evaluate, data=resolve(evaluate.data), include=resolve(evaluate.include))
    problems += [
        f'[evaluate] models: there is no "{m}"; choose from {", ".join(_MODELS)}.'
        for m in evaluate.models
        if m not in _MODELS
    ]
    clients = tuple(dataclasses.replace(client, data=resolve(client.data)) for client in clients)
    if partition is not None:
        partition = dataclasses.replace(partition, data=resolve(partition.data))
    fuse = tables["fuse"] = dataclasses.replace(tables["fuse"], public=resolve(tables["fuse"].public))
    if (fuse.scale == "auto") != bool(fuse.public):
        problems.append('[fuse] scale = "auto" and public = FILE need each other.')
    quorum, count = tables["federate"].quorum, partition.clients if partition is not None else len(clients)
    if isinstance(quorum, int) and 0 < count < quorum:
        problems.append(
            f"[federate] quorum = {quorum}: there are {count} clients. Write a number of replies, or a share with a "
            "decimal point."
        )
    for table, key in (
        ("compress", "score"),
        ("federate", "merge"),
        ("federate", "space"),
        ("federate", "server_optimizer"),
        ("federate", "regulariser"),
        ("federate", "wire"),
        ("federate", "wire_down"),
    ):
        value, names = getattr(tables[table], key), (choices or {}).get(key)
        if names is not None and value not in names:
            problems.append(
                f'[{table}] {key} = "{value}" is not known; choose from {", ".join(sorted(names))}.'
                + did_you_mean(value, names)
            )
    paths = {} if remote else {f"[client {i}] data": c.data for i, c in enumerate(clients, 1)}
    paths |= {"[compress] calibration": tables["compress"].calibration, "[evaluate] data": tables["evaluate"].data}
    paths |= {"[heal] text": tables["heal"].text}
    paths |= {"[fuse] public": fuse.public}
    paths |= {"[evaluate] include": tables["evaluate"].include, "[partition] data": partition.data if partition else ""}
    problems += [
        f"{where}: {path} does not exist." for where, path in paths.items() if path and not Path(path).exists()
    ]
    if tables["federate"].space != "product":
        problems += [
            f'[client {i}] lora_r = {c.lora_r}: clients\' ranks may differ in the space "product" only.'
            for i, c in enumerate(clients, 1)
            if c.lora_r not in (None, tables["train"].lora_r)
        ]
    problems += [
        f"[client {i}] lora_r = {c.lora_r}: must be at most that of [train], {tables['train'].lora_r}."
        for i, c in enumerate(clients, 1)
        if (c.lora_r or 0) > tables["train"].lora_r
    ]
    if compare is not None:
        varied = [_varied(raw, one, problems, source=source, folder=folder, choices=choices) for one in compare.variant]
        compare = dataclasses.replace(compare, variant=tuple(varied))
    if problems:
        raise ConfigError(source, problems)
    return Experiment(client=clients, partition=partition, compare=compare, **top, **tables)


def _varied(
    raw: dict[str, Any],
    variant: Variant,
    problems: list[str],
    *,
    source: str,
    folder: Path,
    choices: Mapping[str, typing.Collection[str]] | None,
) -> Variant:
    """A variant whose settings are checked and read as those of an experiment file that has them."""
    given = {name: raw[name] for name in variant.settings if isinstance(raw.get(name), dict)}
    changed = {name: {**given.get(name, {}), **values} for name, values in variant.settings.items()}
    alone = {key: value for key, value in raw.items() if key != "compare"}
    try:
        found = parse_experiment({**alone, **changed}, source=source, folder=folder, choices=choices)
    except ConfigError as error:
        problems += [f'variant "{variant.name}": {text}' for text in error.problems if text not in problems]
        return variant
    read = {name: {key: getattr(getattr(found, name), key) for key in keys} for name, keys in variant.settings.items()}
    return Variant(name=variant.name, method=variant.method, **read)


def load_experiment(
    path: Path, *, choices: Mapping[str, typing.Collection[str]] | None = None, remote: bool = False
) -> Experiment:
    """Read and check an experiment file; the arguments are those of `parse_experiment`.

    Raises:
        ArtifactError: the file cannot be read.
        ConfigError: anything in it is wrong; all problems are in the error.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"It is not valid TOML: {error}."]) from error
    return parse_experiment(raw, source=str(path), folder=path.resolve().parent, choices=choices, remote=remote)


def to_toml(values: dict[str, Any]) -> str:
    """Write a resolved experiment (`Experiment.as_dict`) as TOML."""

    def literal(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, str):
            escaped = "".join("\\" + c if c in '"\\' else (c if c.isprintable() else f"\\u{ord(c):04x}") for c in value)
            return f'"{escaped}"'
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(literal(v) for v in value) + "]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{literal(str(k))} = {literal(v)}" for k, v in value.items()) + "}"
        return repr(value)

    lines = [f"{k} = {literal(v)}" for k, v in values.items() if not isinstance(v, (dict, list))]
    for name, table in values.items():
        for entry in table if isinstance(table, list) else [table] if isinstance(table, dict) else []:
            lines += ["", f"[[{name}]]" if isinstance(table, list) else f"[{name}]"]
            lines += [f"{k} = {literal(v)}" for k, v in entry.items()]
    return "\n".join(lines) + "\n"
