"""Several runs side by side on one self-contained page."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedproxy.errors import UsageError
from fedproxy.records import MODELS, Results, read_run
from fedproxy.reporting import plots
from fedproxy.reporting.hindrances import hindrances
from fedproxy.reporting.html import Column, column_of, fill, write_page
from fedproxy.reporting.page import argument, grouped, plain
from fedproxy.reporting.rows import Spread
from fedproxy.reporting.svg import drawing, label
from fedproxy.reporting.units import count, duration, percent, points, size


def compare_runs(run_dirs: Sequence[Path | str], out: Path | str) -> Path:
    """Write a page that puts finished runs side by side.

    Args:
        run_dirs: Their folders, two or more.
        out: The page; it links to each run's own report.html.

    Returns:
        The page's path.

    Raises:
        ArtifactError: a results.json is missing or damaged.
        MissingExtraError: the extra `report` is not installed.
        UsageError: there are fewer than two runs, one is given twice, or the page cannot be written.
    """
    folders = [Path(run) for run in run_dirs]
    if len(folders) < 2:
        raise UsageError(f"A comparison needs two runs or more, got {len(folders)}.")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("A run is given twice. Give each run once.")
    out = Path(out)
    named = dict(zip(labels(folders), folders, strict=True))
    pages = {
        name: os.path.relpath(folder.resolve() / "report.html", out.resolve().parent) for name, folder in named.items()
    }
    html = render_comparison({name: read_run(folder) for name, folder in named.items()}, pages)
    write_page(out, html)
    return out


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart.

    Example:
        >>> labels([Path("a/first"), Path("b/first")])
        ['a/first', 'b/first']
    """
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(each[-length:]) for each in parts]
        if len(set(found)) == len(found):
            break
    return found


def render_comparison(runs: Mapping[str, Results], pages: Mapping[str, str]) -> str:
    """The page.

    Args:
        runs: Results by the run's label.
        pages: Relative path of each run's own page.

    Raises:
        MissingExtraError: the extra `report` is not installed.
    """
    fused = {name: run.evaluation["fused"].tasks if "fused" in run.evaluation else {} for name, run in runs.items()}
    tasks = dict.fromkeys(task for scores in fused.values() for task in scores)
    held_back = {name: found for name, run in runs.items() if (found := hindrances(run))}
    return fill(
        "comparison.html.j2",
        title=f"{len(runs)} runs compared",
        contents=["Summary", "Results", *(["What holds them back"] if held_back else []), "Settings", "Reproduce"],
        sentences=sentences(runs),
        columns=_columns(runs),
        links={name: quote(page) for name, page in pages.items()},
        folders={name: argument(os.path.dirname(page) or ".") for name, page in pages.items()},
        tasks={task: {name: scores.get(task) for name, scores in fused.items()} for task in tasks},
        figures=_figures(runs),
        held_back=held_back,
        differences=differences(runs),
    )


def _columns(runs: Mapping[str, Results]) -> list[Column]:
    """The main settings, where they differ, and all outcomes that a run has."""

    def column(title: str, value: Callable[[Results], Any], show: Callable[[Any], str]) -> Column:
        return column_of(title, runs.values(), value, show)

    def text(value: Any) -> str:
        return "–" if value is None else str(value)

    def setting(table: str, key: str) -> Callable[[Results], Any]:
        return lambda run: None if run.setting(table, key) is None else plain(run.setting(table, key))

    settings = [
        column("Seed", lambda run: run.seed, text),
        column("Merge", setting("federate", "merge"), text),
        column("Regulariser", setting("federate", "regulariser"), text),
        column("Rounds", lambda run: len(run.rounds), text),
        column("Clients", lambda run: len(run.clients), text),
    ]
    outcomes = [
        *(
            column(MODELS[model], lambda run, model=model: run.average(model), percent)  # type: ignore[misc]
            for model in MODELS
        ),
        column("Gap closed (%)", lambda run: run.gap_closed, percent),
        column("Worst task", worst_change, lambda value: "–" if value is None else points(value)),
        column("Exposed (%)", lambda run: run.exposed, percent),
        column("Up", lambda run: run.cost.bytes_up, size),
        column("Down", lambda run: run.cost.bytes_down, size),
        column("Time", lambda run: sum(run.cost.seconds.values()) or None, duration),
        column("Memory", lambda run: run.cost.peak_memory, size),
    ]
    differ = [(title, cells) for title, cells in settings if len({value for value, _ in cells}) > 1]
    return differ + [(title, cells) for title, cells in outcomes if any(value is not None for value, _ in cells)]


def worst_change(run: Results) -> float | None:
    """Smallest gain of the fused over the untuned LLM on a task, negative if it lost; None without both."""
    if "llm" not in run.evaluation or "fused" not in run.evaluation:
        return None
    before, after = run.evaluation["llm"].tasks, run.evaluation["fused"].tasks
    return min((after[task] - before[task] for task in after if task in before), default=None)


def sentences(runs: Mapping[str, Results]) -> list[str]:
    """What the comparison shows, and what stands against reading more into it."""
    found = []
    means = {name: mean for name, run in runs.items() if (mean := run.average("fused")) is not None}
    if len(means) > 1:
        best, worst = max(means, key=lambda name: means[name]), min(means, key=lambda name: means[name])
        found.append(
            f"Of {count(len(means), 'run')}, the fused LLM of {best} has the highest mean, {percent(means[best])} %, "
            f"and that of {worst} the lowest, {percent(means[worst])} %: {points(means[best] - means[worst])}."
        )
    closed = {name: gap for name, run in runs.items() if (gap := run.gap_closed) is not None}
    if closed:
        gaps = ", ".join(f"{name} {percent(gap)} %" for name, gap in closed.items())
        found.append(f"Share of the gap to centralized tuning that was closed: {gaps}.")
    unlike = [text for text, values in _grounds(runs).items() if len(set(values)) > 1]
    if unlike:
        found.append(f"The runs differ in {' and '.join(unlike)}: their scores are not those of one test.")
    if len(means) > 1 and len({run.seed for run in runs.values()}) == 1:
        found.append("All runs have the same seed: how much another seed would move them is not known from this page.")
    return found


def _grounds(runs: Mapping[str, Results]) -> dict[str, list[Any]]:
    """What must be the same for scores to be comparable."""
    return {
        "the LLM": [run.llm.sha256 for run in runs.values()],
        "the tasks": [tuple(sorted(run.tasks)) for run in runs.values()],
        "the number of rows scored": [
            tuple((task, run.rows(task)) for task in sorted(run.tasks)) for run in runs.values()
        ],
    }


def differences(runs: Mapping[str, Results]) -> dict[str, dict[str, str]]:
    """Setting → its value in each run, for those that differ; a dash where a run has none."""
    flat = {
        name: {
            f"[{table}] {key}" if table else key: value
            for table, values in grouped(run.experiment)
            for key, value in values
        }
        for name, run in runs.items()
    }
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    table = {key: {name: values.get(key, "–") for name, values in flat.items()} for key in keys}
    return {key: values for key, values in table.items() if len(set(values.values())) > 1}


def _figures(runs: Mapping[str, Results]) -> dict[str, str]:
    found = {}
    scored = {name: run.evaluation["fused"] for name, run in runs.items() if "fused" in run.evaluation}
    means = {name: mean for name, each in scored.items() if (mean := each.average) is not None}
    exposed = {name: 100 * share for name in means if (share := runs[name].exposed) is not None}
    sent = {name: bytes_up / 1e6 for name in means if (bytes_up := runs[name].cost.bytes_up) is not None}
    with drawing():
        if means:
            tasks = list(dict.fromkeys(task for each in scored.values() for task in each.tasks))
            told = ", ".join(f"{label(name)} {100 * mean:.1f} %" for name, mean in means.items())
            found["task_scores"] = plots.points(
                {name: [*map(each.tasks.get, tasks), each.average] for name, each in scored.items()},
                [*tasks, "Mean"],
                name="task-scores",
                title="Fused LLM: score by task",
                text=f"Points, a row a task; numbers in the table. Means: {told}.",
            )
        for name, costs, title, axis in (
            ("exposed", exposed, "Quality against exposure", "parameters in the proxy (% of the LLM's)"),
            ("bytes", sent, "Quality against traffic", "sent by the clients (MB)"),
        ):
            if len(costs) > 1:
                marks = [plots.Mark(run, cost, Spread(*[means[run]] * 3)) for run, cost in costs.items()]
                found[name] = plots.trade_off(marks, name=name, title=title, axis=axis, score="mean score (%)")
        losses = {
            name: {round_.number: loss for round_ in run.rounds if (loss := round_.loss) is not None}
            for name, run in runs.items()
        }
        if any(losses.values()):
            found["losses"] = plots.lines(
                losses,
                name="mean-losses",
                title="Training loss by round, mean of the clients",
                axis="loss (nats a token)",
                each="a run each; every client counts the same",
            )
    return found
