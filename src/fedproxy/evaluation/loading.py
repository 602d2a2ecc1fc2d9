"""Tasks of the harness, pointed at local rows and loaded.

For each task a YAML is generated that replaces nothing but where the rows come from and which splits are read. The
harness reads no other: of a task without code it holds all the rest as well. One with code it includes by its absolute
path, so that Python functions resolve.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import yaml

from fedproxy.data import read_objects
from fedproxy.errors import ArtifactError, FedproxyError
from fedproxy.evaluation.library import contained, harness_module
from fedproxy.evaluation.tasks import Folder, TaskFile, find_task


class _Dumper(yaml.SafeDumper):
    """Writes functions as the harness reads them."""


_Dumper.add_representer(
    FunctionType,
    lambda dumper, function: dumper.represent_scalar("!function", f"{function.__module__}.{function.__name__}"),
)
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def read_splits(files: Mapping[str, Sequence[str]], answered: bool = False, **_metadata: object) -> dict[str, Any]:
    """Read a task's splits from JSON Lines files: the function that generated YAMLs name as `custom_dataset`.

    The harness's usual way, `load_dataset`, would copy the rows into a cache on disk, take strings that look like
    dates for dates, and tell the Hub.

    Args:
        files: For each split, its files.
        answered: Pass over rows whose "answerKey" is empty, which is how the Hub hides the answers of test rows.
        _metadata: The task's metadata, which the harness hands over as well.

    Returns:
        For each split, a `datasets.Dataset`.

    Raises:
        ArtifactError: a file cannot be read, or a field holds values of several types.
    """
    datasets = harness_module("datasets")
    splits = {}
    for split, paths in files.items():
        rows = [row for path in paths for row in read_objects(Path(path))]
        if answered:
            rows = [row for row in rows if row.get("answerKey") != ""]
        fields = dict.fromkeys(field for row in rows for field in row)
        try:
            splits[split] = datasets.Dataset.from_dict({field: [row.get(field) for row in rows] for field in fields})
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{', '.join(paths)}: a field holds values of several types: {error}.") from error
    return splits


def load_for_evaluation(
    names: Sequence[str], *, data: Folder, include: Folder, trust_tasks: bool = False
) -> dict[str, Any]:
    """Load tasks as the harness's Task objects, by name and in this order, with the splits that scoring needs.

    Args:
        names: The tasks' names.
        data: Folder with DATA/NAME/SPLIT.jsonl for each task that does not name files of its own; None leaves it to
            the harness to get the rows from the Hub.
        include: Folder of the user's own task YAMLs.
        trust_tasks: Let code that these bring run.

    Raises:
        UsageError: an unknown task, or one with code that is not trusted.
        ArtifactError: a YAML or data file is missing or cannot be used.
        MissingExtraError: the harness is not installed.
    """
    generated = []
    for task in [find_task(name, include, trust_tasks=trust_tasks) for name in dict.fromkeys(names)]:
        config = task.config
        split = config.get("test_split") or config.get("validation_split")
        if split is None:
            raise ArtifactError(f"{task.path} names neither test_split nor validation_split: nothing to score.")
        needed = {split}
        if config.get("num_fewshot"):
            ranking = ("fewshot_split", "training_split", "validation_split", "test_split")
            needed.add(next(config[key] for key in ranking if config.get(key)))
        generated.append((task, _generate(task, data, needed)))
    return _load(generated)


def load_for_training(name: str, *, split: str | None, data: Folder, include: Folder, trust_tasks: bool = False) -> Any:
    """Load a task as the harness's Task object whose `task_docs` are a split's rows, by default the training split's.

    Folders and trust are as of `load_for_evaluation`.

    Raises:
        UsageError: an unknown task, or one with code that is not trusted.
        ArtifactError: the task has no training split, or a YAML or data file is missing or cannot be used.
        MissingExtraError: the harness is not installed.
    """
    task = find_task(name, include, trust_tasks=trust_tasks)
    chosen = split or task.config.get("training_split")
    if chosen is None:
        named = {str(task.config[key]) for key in ("validation_split", "test_split") if task.config.get(key)}
        there = sorted(named | set(_local_files(task, data) or {}))
        raise ArtifactError(f"the task {name!r} names no training split. Its splits: {', '.join(there)}.")
    config = {**task.config, "training_split": None, "validation_split": chosen, "test_split": None, "num_fewshot": 0}
    generated = _generate(replace(task, config=config), data, {chosen})
    if generated.get("custom_dataset") is read_splits:
        generated["dataset_kwargs"]["answered"] = True
    return _load([(task, generated)])[name]


def _local_files(task: TaskFile, data: Folder) -> dict[str, list[Path]] | None:
    """The local files of each split, whether they exist or not; None if the rows come from elsewhere."""
    if task.own:
        named = (task.config.get("dataset_kwargs") or {}).get("data_files")
        if named is not None and "://" not in str(named):
            lists = named if isinstance(named, dict) else {"train": named}
            return {
                str(split): [task.path.parent / path for path in (paths if isinstance(paths, list) else [paths])]
                for split, paths in lists.items()
            }
        if named is not None or "custom_dataset" in task.config:
            return None
    if not data:
        return None
    folder = (Path(data) / task.name).resolve()
    splits = {path.stem for path in folder.glob("*.jsonl")} | {
        str(task.config[key]) for key in _SPLITS if task.config.get(key)
    }
    return {split: [folder / f"{split}.jsonl"] for split in sorted(splits)}


def _generate(task: TaskFile, data: Folder, needed: set[str]) -> dict[str, Any]:
    """The YAML that is the task and reads the `needed` splits only."""
    config: dict[str, Any] = {"include": str(task.path), "task": task.name} if task.code else dict(task.config)
    config |= {key: task.config[key] if task.config.get(key) in needed else None for key in _SPLITS}
    if not task.config.get("num_fewshot"):
        config |= {"fewshot_split": None, "fewshot_config": {"samples": []}}
    files = _local_files(task, data)
    if files is None:
        return config
    for split in sorted(needed):
        if split not in files:
            raise ArtifactError(f"{task.path} names no data file for its split {split!r}, only for {', '.join(files)}.")
        for path in files[split]:
            if not path.is_file():
                raise ArtifactError(f"{path} is missing: it should hold the split {split!r} of the task {task.name!r}.")
    paths = {split: [str(path) for path in files[split]] for split in sorted(needed)}
    if all(path.endswith((".jsonl", ".jsonl.gz")) for group in paths.values() for path in group):
        return {**config, "dataset_kwargs": {"files": paths}, "custom_dataset": read_splits}
    return {**config, "dataset_kwargs": {**task.config["dataset_kwargs"], "data_files": paths}}


def _load(generated: Sequence[tuple[TaskFile, Mapping[str, Any]]]) -> dict[str, Any]:
    tasks = {}
    with tempfile.TemporaryDirectory(prefix="fedproxy-tasks-") as folder, contained():
        manager = harness_module("lm_eval.tasks").TaskManager(include_defaults=False)
        for number, (task, config) in enumerate(generated):
            path = Path(folder) / f"{number}.yaml"
            path.write_text(yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False), encoding="utf-8")
            try:
                tasks[task.name] = manager.load([str(path)])["tasks"][task.name]
            except FedproxyError:
                raise
            except Exception as error:
                raise ArtifactError(
                    f"the harness cannot prepare the task {task.name!r} from {task.path} and its rows: "
                    f"{type(error).__name__}: {error}."
                ) from error
    return tasks
