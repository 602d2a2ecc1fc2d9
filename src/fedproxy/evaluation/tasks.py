"""Tasks of the LM evaluation harness, found by name: in a folder of the user's own YAMLs, or among the stock ones.

The harness's own index of all its tasks takes many seconds to build, so it is never built: YAMLs whose path resembles
the name are looked into first.
"""

import difflib
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedproxy.errors import ArtifactError, UsageError
from fedproxy.evaluation.library import contained, harness_module

Folder = str | Path | None
_TASK_NAME = re.compile(rb"^(?:\xef\xbb\xbf)?[\"']?task[\"']?:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)

_NAMING_CODE = {
    "dataset_kwargs": ("trust_remote_code", "storage_options"),
    "generation_kwargs": ("trust_remote_code", "custom_generate"),
}


@dataclass(frozen=True)
class TaskFile:
    """A task's YAML.

    Attributes:
        name: The task's name.
        path: The YAML, absolute.
        config: Its contents, includes merged; Python functions are left as None.
        own: It is the user's own, not one of the harness's.
        code: What in it is code, or names code, that the harness would run.
    """

    name: str
    path: Path
    config: dict[str, Any]
    own: bool
    code: list[str]


class _Loader(yaml.SafeLoader):
    """Reads what has a tag of the harness's as None, and keeps note of it."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self.tagged: list[str] = []

    def pass_over(self, suffix: str, node: yaml.Node) -> None:
        self.tagged.append(f"!{suffix} {node.value!s:.99}")


_Loader.add_multi_constructor("!", _Loader.pass_over)


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[str]]:
    """What a YAML holds with what it includes, and the Python functions in all these files, each with its file."""
    try:
        if path in above:
            raise ValueError("it includes itself")
        loader = _Loader(path.read_bytes())
        config = loader.get_single_data()
        if not isinstance(config, dict):
            raise ValueError("no mapping at its top level")
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ArtifactError(f"{path} is no task of the harness: {error}.") from error
    functions = [f"{tagged} in {path}" for tagged in loader.tagged]
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        more, its_functions = _read_yaml((path.parent / str(include)).resolve(), (*above, path))
        merged |= more
        functions += its_functions
    return merged | config, functions


def _named_code(config: dict[str, Any]) -> list[str]:
    """The keys of a task without functions by which the libraries below it still run what others wrote."""
    harness_module("lm_eval.api.metrics")  # registers the harness's own
    known = harness_module("lm_eval.api.registry").METRIC_REGISTRY
    metrics = config.get("metric_list")
    found = [
        f"metric: {metric.get('metric')}"  # a script of the evaluate library
        for metric in (metrics if isinstance(metrics, list) else [])
        if isinstance(metric, dict) and (metric.get("hf_evaluate") or str(metric.get("metric")) not in known)
    ]
    for table, keys in _NAMING_CODE.items():
        settings = config.get(table)
        found += [f"{table}: {key}" for key in keys if isinstance(settings, dict) and settings.get(key)]
    addresses = str(config.get("dataset_kwargs"))
    if "::" in addresses or set(re.findall(r"([\w+.-]+)://", addresses)) - {"http", "https", "hf"}:
        found.append("dataset_kwargs: an address that is not of http, https or hf")  # fsspec has some with templates
    source = str(config.get("dataset_path"))
    if source == "pandas" or source.endswith(".py"):  # pickles; scripts, before datasets 4.0
        found.append(f"dataset_path: {source}")
    return found


@functools.cache
def _stock_paths() -> tuple[Path, list[Path]]:
    folder = Path(harness_module("lm_eval").__file__).parent / "tasks"
    return folder, sorted(folder.rglob("*.yaml"))


def _task_name(path: Path) -> str | None:
    found = _TASK_NAME.search(path.read_bytes())
    return found.group(1).decode() if found else None


@functools.cache
def _stock_task(name: str) -> Path | None:
    folder, paths = _stock_paths()
    words = [word for word in re.split(r"[^0-9a-z]+", name.lower()) if word]
    likely = [path for path in paths if any(word in str(path.relative_to(folder)).lower() for word in words)]
    for candidates in (likely, paths):
        for path in candidates:
            if _task_name(path) == name:
                return path
    return None


def _own_tasks(include: Path) -> dict[str, Path]:
    if not include.is_dir():
        raise UsageError(f"{include}: no such folder. include is a folder of the harness's task YAMLs.")
    own: dict[str, Path] = {}
    for path in sorted(file for file in include.rglob("*.y*ml") if file.suffix in (".yaml", ".yml") and file.is_file()):
        name = _read_yaml(path.resolve())[0].get("task")
        if isinstance(name, str):
            if name in own:
                raise ArtifactError(f"the task {name!r} is defined twice: in {own[name]} and in {path}.")
            own[name] = path.resolve()
    return own


def _members(name: str, include: Path | None) -> list[str]:
    """The tasks that the harness knows by the name of a group or a tag; none if it is no such name.

    Its index is built for names alone that some YAML has in such a place.
    """
    named = re.compile(rb"^(?:[\"']?(?:tag|group)[\"']?:| *-)[^\n]*" + re.escape(name).encode(), re.MULTILINE)
    folders = [_stock_paths()[0], *([include] if include else [])]
    if not any(named.search(file.read_bytes()) for one in folders for file in one.rglob("*yaml") if file.is_file()):
        return []
    with contained():
        index = harness_module("lm_eval.tasks").TaskManager(include_path=include).task_index

    def below(item: Any, above: tuple[Any, ...] = ()) -> list[str]:
        if not isinstance(item, str):  # a task or group that the group itself describes
            item = item.get("task") or item.get("group")
        entry = index.get(item) if isinstance(item, str) and item not in above else None
        parts = (
            [*sorted(entry.tags), *(entry.cfg or {}).get("task", ())] if entry and "TASK" not in entry.kind.name else []
        )
        return [task for part in parts for task in below(part, (*above, item))] or [str(item)]

    return [task for task in dict.fromkeys(below(name)) if task != name]


def find_task(name: str, include: Folder = None, *, trust_tasks: bool = False) -> TaskFile:
    """Find a task by name: among the user's own, whose YAMLs are in `include`, then among the harness's stock ones.

    Raises:
        UsageError: there is no such task or no such folder, it is a group or a tag, whose tasks are named, or it is the
            user's own and brings code, which is not trusted.
        ArtifactError: a YAML cannot be read.
        MissingExtraError: the harness is not installed.
    """
    include = Path(include) if include else None
    own = _own_tasks(include) if include is not None else {}
    path = own.get(name) or _stock_task(name)
    if path is None:
        if members := _members(name, include):
            raise UsageError(
                f"{name!r} is a group of {len(members)} tasks. Name those you want of: {', '.join(members)}."
            )
        stock = [found for file in _stock_paths()[1] if (found := _task_name(file))]
        close = difflib.get_close_matches(name, [*own, *stock], n=3)
        meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        looked = f"in {include} ({', '.join(sorted(own)) or 'no tasks'}) and " if include is not None else ""
        raise UsageError(f"unknown task {name!r}.{meant} Looked {looked}among the {len(stock)} tasks of the harness.")
    config, functions = _read_yaml(path)
    if "class" in config:
        raise UsageError(f"the task {name!r} is a Python class ({path}); only tasks written in YAML can be used.")
    code = functions or [f"{named} in {path}" for named in _named_code(config)]
    if name in own and code and not trust_tasks:
        raise UsageError(
            f"the task {name!r} brings code of its own ({'; '.join(code)}). Read it, and if you trust it, say so: "
            "--trust-tasks, or trust_tasks in [evaluate] and in Python."
        )
    return TaskFile(name, path, config, name in own, code)
