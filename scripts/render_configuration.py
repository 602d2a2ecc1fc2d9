"""Render docs/configuration.md, the reference of the experiment file, from the dataclasses that read it: `make docs`."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedproxy import config
from fedproxy.aggregation.merge import RULES
from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.aggregation.server_optimizer import SERVER_OPTIMIZERS
from fedproxy.federation.wire import ENCODINGS

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
TABLES = {"llm": config.LLM, "compress": config.Compress, "heal": config.Heal, "[client]": config.Client}
TABLES |= {
    "partition": config.Partition,
    "train": config.Train,
    "train.privacy": config.Privacy,
    "federate": config.Federate,
    "federate.privacy": config.ClientPrivacy,
}
TABLES |= {"fuse": config.Fuse, "evaluate": config.Evaluate, "compare": config.Compare}
TABLES |= {"[compare.variant]": config.Variant}
STRENGTHS = {name: row.strength for name, row in REGULARISERS.items() if row.strength is not None}
OWN = {(config.Heal, "learning_rate"): config.HEALING_RATES, (config.Federate, "regulariser_strength"): STRENGTHS}
"""Keys whose default hangs on another key: that key's value → the default."""


def meanings(kind: type) -> tuple[str, dict[str, str]]:
    """What a docstring says of the whole, and of each attribute."""
    whole, _, attributes = (inspect.getdoc(kind) or "").partition("\n\nAttributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    return " ".join(whole.split()), {name: " ".join(text.split()) for name, text in entries}


def checks(kind: Any) -> list[Any]:
    """The rules and choices of an annotated type, of whatever it holds too."""
    own = [check for check in getattr(kind, "__metadata__", ()) if isinstance(check, config.Rule | config.Choice)]
    return own + [check for inner in typing.get_args(kind) for check in checks(inner)]


def type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(literal, typing.get_args(kind)))
    inner = [option for option in typing.get_args(kind) if option is not type(None)]
    if typing.get_origin(kind) is list:
        return f"list of {type_name(inner[0])}s"
    if typing.get_origin(kind) is dict or dataclasses.is_dataclass(kind):
        return "table"
    if inner:
        return " or ".join(map(type_name, inner))
    return {str: "string", int: "whole number", float: "number", bool: "true or false"}[kind]


def literal(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "`{}`"
    return (
        f"`{config.to_toml({'x': value}).removeprefix('x = ').strip()}`"
        if not isinstance(value, list)
        else f"`{value}`"
    )


def default(field: "dataclasses.Field[Any]") -> str:
    if field.default is field.default_factory is dataclasses.MISSING:
        return "must be given"
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return literal(made).replace("'", '"')


def table(kind: type) -> str:
    _, says = meanings(kind)
    hints, annotated = typing.get_type_hints(kind), typing.get_type_hints(kind, include_extras=True)
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        if typing.get_origin(hints[field.name]) is tuple:  # tables of their own
            continue
        found = checks(annotated[field.name])
        choices = ", ".join(f"`{name}`" for check in found if isinstance(check, config.Choice) for name in check.names)
        limit = "".join(check.says for check in found if isinstance(check, config.Rule))
        several = "Some" if typing.get_origin(hints[field.name]) is list else "One"
        own = ", ".join(f"{literal(value)} with `{name}`" for name, value in OWN.get((kind, field.name), {}).items())
        told = [
            says.get(field.name, ""),
            f"By default {own}." if own else "",
            f"{several} of {choices}." if choices else "",
        ]
        told += [f"Must be {limit}." if limit else ""]
        cells = [f"`{field.name}`", type_name(hints[field.name]), default(field), " ".join(filter(None, told))]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def options(registry: Mapping[str, Any]) -> list[str]:
    """The options of every row that has some."""
    rows = [(name, row.options) for name, row in sorted(registry.items()) if dataclasses.fields(row.options)]
    return [part for name, kind in rows for part in (f"### `{name}`", table(kind))]


def page() -> str:
    parts = [
        "# The experiment file",
        "Rendered from `src/fedproxy/config/tables.py` by `make docs`; `tests/docs/test_configuration.py` holds it to that. The file is TOML. Every problem of the "
        "file itself (names, types, limits, paths that do not exist) is reported at once. What does not fit the LLM or the data, such as numbers of blocks, LoRA "
        "targets, or rows of messages without a chat template, is reported one by one, before a weight is read. Relative paths count from the file's folder.",
        "Above all tables stand `name` (string, default `experiment`) and `seed` (whole number, default `0`).",
    ]
    for name, kind in TABLES.items():
        title, text = f"`[{name}]`", meanings(kind)[0]
        parts += [f"## {title}", text[text.index(":") + 2 :][:1].upper() + text[text.index(":") + 3 :], table(kind)]
    parts += [
        "## Options of the merge rules",
        'They go into `merge_options` of `[federate]`, as in `merge_options = { trim = 0.1, clip_norm = "median" }`. Every rule takes `clip_norm`, the largest '
        'Euclidean norm that an update counts with: a number, or `"median"` of the round.',
    ]
    parts += options(RULES)
    parts += ["## Options of the server optimizers", "They go into `server_options` of `[federate]`."]
    parts += options(SERVER_OPTIMIZERS)
    parts += ["## Options of the encodings", "They go into `wire_options` of `[federate]`; `wire_down` takes none."]
    parts += options(ENCODINGS)
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
