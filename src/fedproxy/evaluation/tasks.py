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


@dataclass(frozen=True)
class TaskFile:
    """A task's YAML.

    Attributes:
        name: The task's name.
        path: The YAML, absolute.
        config: Its contents, includes merged; Python functions are left as None.
        own: It is the user's own, not one of the harness's.
    """

    name: str
    path: Path
    config: dict[str, Any]
    own: bool


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        if path in above:
            raise ValueError("it includes itself")
        config = yaml.load(path.read_bytes(), Loader=_Loader)
        if not isinstance(config, dict):
            raise ValueError("no mapping at its top level")
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ArtifactError(f"{path} is no task of the harness: {error}.") from error
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        merged |= _read_yaml((path.parent / str(include)).resolve(), (*above, path))
    return merged | config


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
        name = _read_yaml(path.resolve()).get("task")
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


def find_task(name: str, include: Folder = None) -> TaskFile:
    """Find a task by name: among the user's own, whose YAMLs are in `include`, then among the harness's stock ones.

    Raises:
        UsageError: there is no such task or no such folder, or it is a group or a tag, whose tasks are named.
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
    config = _read_yaml(path)
    if "class" in config:
        raise UsageError(f"the task {name!r} is a Python class ({path}); only tasks written in YAML can be used.")
    return TaskFile(name, path, config, own=name in own)
