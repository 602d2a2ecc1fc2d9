"""Methods compared on the same work: the same rows, prompts, steps and order of batches for all; each cell once.

DIR/experiment.toml, environment.json, events.jsonl
DIR/jobs.json                         how many processes run cells
DIR/cells/METHOD/seed-S-remove-R/    cell.json, and the scores of every document
DIR/work/                            what cells share (see `work`); once all cells are there, it can go
DIR/compare.json                     all cells, summaries over seeds, paired differences
"""

import dataclasses
import functools
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from fedproxy.artifacts import check_spared, read_json, write_json
from fedproxy.comparison.cells import RECORD, Key, cell_folder, of_all_seeds, rows_by_seed, run_cell
from fedproxy.comparison.crew import OnCellProgress, processes, run_in_processes
from fedproxy.comparison.statistics import DRAWS, LEVEL, paired_difference
from fedproxy.comparison.work import DOCUMENTS, digest
from fedproxy.config import VARIED, Compare, Experiment, from_folder
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.evaluation.experiment import check_tasks, scored_tasks
from fedproxy.federation.client_rows import encode_for
from fedproxy.federation.fitting import check_compression, check_fit
from fedproxy.federation.settings import check_settings
from fedproxy.methods import CENTRALIZED, FEDPROXY, ZERO_SHOT, Method, configured, methods_of
from fedproxy.metrics import gap_closed
from fedproxy.models.checkpoints import Model
from fedproxy.models.costs import FORMULA
from fedproxy.models.source import open_source
from fedproxy.pipeline import read_experiment
from fedproxy.reporting.rows import Compared, Spread
from fedproxy.run_directory import owned
from fedproxy.seeds import derive_seed
from fedproxy.tensor_files import load_tensors
from fedproxy.typed_json import as_record

__all__ = ["cells_of", "compare", "summary"]

AGAINST = (FEDPROXY, CENTRALIZED)
"""What every method is compared with."""
_SUMMARISED = {
    "accuracy": "accuracy.average",
    "proxy_tuned": "proxy_tuned.average",
    "worst": "worst.accuracy",
    "gap_closed": "gap_closed",
}
"""What a summary holds, and its place in a cell."""
_JOBS = "jobs.json"
_BUDGET = {"rounds", "participation", "quorum", "keep_rounds"}
"""What of [federate] a training without a federation goes by."""


def cells_of(experiment: Experiment) -> list[Key]:
    """The cells of a comparison, in the order in which they are run."""
    asked = experiment.compare or Compare()
    ratios = [float(ratio) for ratio in asked.ratios] or [experiment.compress.remove]
    return [(name, seed, ratio) for seed, ratio, name in product(asked.seeds, ratios, methods_of(asked))]


def compare(
    experiment: Experiment | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    jobs: int | None = None,
    on_progress: OnCellProgress = lambda key, stage, fraction, text: None,
    on_cell: Callable[[dict[str, Any]], None] = lambda cell: None,
) -> dict[str, Any]:
    """Run every method with every seed at every ratio of [compare].

    Args:
        experiment: An experiment file, or one loaded.
        out: The directory of the comparison.
        resume: Go on with one that was begun; methods, variants, seeds and ratios may have been added since.
        overwrite: Replace an earlier one.
        jobs: How many cells to run at once, in processes of their own; 1 runs them in this one. If none, as many as
            when the comparison was begun, and at first as many as processors and memory allow.
        on_progress: Told cell, stage, fraction and text of what is being done.
        on_cell: Told the record of each cell, also of those that were there.

    Returns:
        What compare.json holds.

    Raises:
        ConfigError, UsageError: the experiment or a path cannot be used, a method does not fit the experiment, or a
            cell that is there is of a variant with other settings.
        ArtifactError: the LLM, a client's data or a task cannot be used.
        FederationError: a round has no quorum.
        ResourceError: memory or disk do not suffice; what was complete stays.

    Example:
        `compare("experiment.toml", "compared")["cells"][0]["method"]` → `"fedavg"`
    """
    folder = None if isinstance(experiment, Experiment) else Path(experiment).resolve().parent
    path, experiment = Path(out), read_experiment(experiment)
    asked, keys = experiment.compare or Compare(), cells_of(experiment)
    methods, whole = methods_of(asked), dataclasses.replace(experiment, compare=asked)
    experiment = dataclasses.replace(experiment, compare=None)
    tasks_to_compare(experiment)
    check_tasks(experiment)
    source = open_source(experiment.llm.path, trust_remote_code=experiment.llm.trust_remote_code)
    check_methods(experiment, methods, keys, source.decoder)
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs = {jobs}: at least one cell is run at a time.")
    rows = rows_by_seed(experiment)
    trained = any(method.data != "none" for method in methods.values())
    if trained:
        encode_for(source.path, rows(keys[0][1]), experiment)
    if overwrite:
        check_spared(path, whole.inputs)
    with owned(path, experiment, resume=resume, overwrite=overwrite) as directory:
        if trained:
            directory.check_same_rows(of_all_seeds(rows, {seed for _, seed, _ in keys}))

        def done(key: Key, seconds: float) -> None:
            name, seed, remove = key
            directory.event("cell_done", method=name, seed=seed, remove=remove, seconds=seconds)
            on_cell(_cell(path, methods[name], key))

        left = [key for key in keys if not cell_folder(path, key).is_dir()]
        for key in keys:
            if key not in left:
                on_cell(_cell(path, methods[key[0]], key))
        jobs = _jobs(path, experiment, jobs, len(keys))
        cells = [(methods[key[0]], key) for key in left]
        if jobs > 1:
            run_in_processes(path, cells, jobs, on_progress, done)
        else:
            for method, key in cells:
                done(key, run_cell(experiment, path, method, key, rows, functools.partial(on_progress, key)))
        found = {
            (name, seed, remove): {
                **_cell(path, methods[name], (name, seed, remove)),
                "experiment_sha256": digest(
                    _record(configured(methods[name], experiment, seed=seed, remove=remove), folder)
                ),
            }
            for name, seed, remove in keys
        }
        recorded, gapped = _record(whole, folder)["compare"], with_gaps(found)
        result = {
            "name": experiment.name,
            "compare": recorded,
            "experiment": _record(experiment, folder),
            "experiment_sha256": digest(_record(experiment, folder)),
            "commit": _commit(),
            "environment": read_json(path / "environment.json"),
            "methods": {name: {**row.axes, "paper": row.paper} for name, row in methods.items()}
            | {one["name"]: {**methods[one["name"]].axes, **_varied(one)} for one in recorded["variant"]},
            "flops": FORMULA,
            "cells": gapped,
            "summary": summary(gapped),
            "differences": _differences(path, keys),
        }
        write_json(path / "compare.json", result)
        return result


def _cell(path: Path, method: Method, key: Key) -> dict[str, Any]:
    """What a cell found; without the settings of its method, which are held against the method's.

    Raises:
        UsageError: they differ.
    """
    folder = cell_folder(path, key)
    record: dict[str, Any] = read_json(folder / RECORD)
    if (there := record.pop("settings", method.settings)) != method.settings:
        raise UsageError(
            f'{folder} is a cell of "{method.name}" with other settings: {there}. Give the variant another name, or '
            f"remove {folder.parent}."
        )
    return record


def _varied(variant: Mapping[str, Any]) -> dict[str, str]:
    """What a variant, as recorded, is of, and what it sets."""
    settings = [(table, key, value) for table in VARIED for key, value in variant.get(table, {}).items()]
    return {
        "variant of": variant["method"],
        "sets": ", ".join(f"{table}.{key} = {json.dumps(value)}" for table, key, value in settings),
    }


def _record(experiment: Experiment, folder: Path | None) -> dict[str, Any]:
    """An experiment as plain values; paths count from the folder of its file, if it has one."""
    values = experiment.as_dict()
    return values if folder is None else from_folder(values, folder)


def _jobs(path: Path, experiment: Experiment, asked: int | None, cells: int) -> int:
    """How many cells to run at once. It is kept: the number of threads, and with it the last bits, hang on it.

    Raises:
        ArtifactError: the file that keeps it holds something else.
    """
    if asked is None and (path / _JOBS).is_file():
        record = read_json(path / _JOBS)
        kept = record.get("jobs") if isinstance(record, dict) else record
        if type(kept) is not int or kept < 1:
            raise ArtifactError(f"{path / _JOBS}: jobs = {kept!r} is no number of processes. Give --jobs.")
        return kept
    count = asked or min(processes(experiment), cells)
    write_json(path / _JOBS, {"jobs": count})
    return count


def tasks_to_compare(experiment: Experiment) -> list[str]:
    """The tasks that methods are compared by.

    Raises:
        UsageError: there are none.
    """
    if not (tasks := scored_tasks(experiment)):
        raise UsageError("There is nothing to compare by: give [evaluate] tasks, or clients with a task.")
    return tasks


def check_methods(experiment: Experiment, methods: Mapping[str, Method], keys: Sequence[Key], decoder: Model) -> None:
    """Check that the methods fit the experiment and an LLM, before anything is done.

    Raises:
        UsageError: one does not.
    """
    for name, seed, remove in keys:
        try:
            _check_method(methods[name], configured(methods[name], experiment, seed=seed, remove=remove), decoder)
        except UsageError as error:
            raise UsageError(f"{name}, remove = {remove:g}: {error}") from error


def _check_method(method: Method, experiment: Experiment, decoder: Model) -> None:
    if method.result == "llm":
        return
    if method.data == "none":
        check_compression(experiment, decoder)
        return
    check_settings(experiment.federate, experiment.client_names)
    idle = sorted(method.settings.get("federate", {}).keys() - _BUDGET)
    if method.data != "clients" and idle:
        raise UsageError(
            f"without a federation [federate] {', '.join(idle)} has no meaning. Leave it out of the variant."
        )
    check_fit(experiment, decoder)


def _commit() -> str | None:
    """The commit of the repository that the command was given in, with a mark if files differ from it."""
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, encoding="utf-8").stdout.strip() or None


def with_gaps(found: Mapping[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells, each with the share of the way from the untuned LLM to centralized tuning that it went."""
    gapped = []
    for (_, seed, remove), cell in found.items():
        ends = {"llm": found.get((ZERO_SHOT, seed, remove)), "centralized": found.get((CENTRALIZED, seed, remove))}
        gap = gap_closed({name: one["accuracy"] for name, one in {**ends, "fused": cell}.items() if one})
        gapped.append({**cell, "gap_closed": gap})
    return gapped


def summary(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each method and ratio, the mean over the seeds, and the lowest and highest.

    Args:
        cells: Their records.
    """

    def plain(spread: Spread | None) -> dict[str, float] | None:
        return None if spread is None else dataclasses.asdict(spread)

    return [
        {"method": row.method, "remove": row.remove, "seeds": len(row.cells)}
        | {"tasks": {task: plain(spread) for task, spread in row.tasks.items()}}
        | {what: plain(row.spread(place)) for what, place in _SUMMARISED.items()}
        for row in as_record({"cells": cells}, Compared, "the comparison").rows
    ]


def _differences(path: Path, keys: Sequence[Key]) -> list[dict[str, Any]]:
    """Every method against FedProxy and against centralized tuning, at each ratio."""
    names, seeds = list(dict.fromkeys(key[0] for key in keys)), list(dict.fromkeys(key[1] for key in keys))
    ratios = dict.fromkeys(key[2] for key in keys)
    found = []
    for remove, other, name in product(ratios, AGAINST, names):
        if other not in names or name == other:
            continue
        documents = {
            method: [load_tensors(cell_folder(path, (method, seed, remove)) / DOCUMENTS) for seed in seeds]
            for method in (name, other)
        }
        both = [one.keys() for method in (name, other) for one in documents[method]]
        tasks = [task for task in documents[name][0] if all(task in one for one in both)]
        if not tasks:
            continue
        scores, others = (
            {task: [one[task].tolist() for one in documents[method]] for task in tasks} for method in (name, other)
        )
        difference = paired_difference(scores, others, seed=derive_seed(0, "bootstrap", name, other))
        found.append(
            {"method": name, "against": other, "remove": remove, "tasks": tasks}
            | dataclasses.asdict(difference)
            | {"draws": DRAWS, "level": LEVEL}
        )
    return found
