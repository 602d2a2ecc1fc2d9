"""The run as one self-contained HTML page: no script, no network, light and dark, from phone to wide screen."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedproxy.artifacts import new_file
from fedproxy.errors import MissingExtraError
from fedproxy.reporting import plots, units
from fedproxy.reporting.results import MODELS, Results, Round, load, load_events
from fedproxy.reporting.summary import sentences
from fedproxy.reporting.svg import drawing

_HEAT_MAP_CLIENTS, _SMALL_HEAT_MAPS, _SMALL_CELLS = 60, 24, 4000
_EVENTS = 500


def report(run_dir: Path | str) -> Path:
    """Write RUN/report.html from RUN/results.json.

    Args:
        run_dir: The folder of a finished run.

    Returns:
        The page's path.

    Raises:
        ArtifactError: results.json is missing or damaged.
        MissingExtraError: the extra `report` is not installed.
        UsageError: the page cannot be written.
    """
    run_dir = Path(run_dir)
    html = render(load(run_dir), events=load_events(run_dir), run=run_dir.name or "RUN")
    path = run_dir / "report.html"
    with new_file(path) as file:
        file.write(html.encode())
    return path


def render(results: Results, *, events: list[dict[str, Any]], run: str) -> str:
    """The page.

    Args:
        results: The run.
        events: What happened, in order; the last `_EVENTS` are shown.
        run: Name of the run's folder, for the commands that reproduce it.

    Raises:
        MissingExtraError: the extra `report` is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("The report", "report") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedproxy.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": units.percent, "size": units.size, "duration": units.duration}
    return environment.get_template("page.html.j2").render(
        results=results,
        models=MODELS,
        sentences=sentences(results),
        figures=_figures(results),
        settings=_settings(results.experiment),
        environment=_settings(results.environment),
        precision=_precision(results),
        events=[", ".join(f"{key}: {value}" for key, value in event.items()) for event in events[-_EVENTS:]],
        run=shlex.quote(run),
    )


def _figures(results: Results) -> dict[str, Any]:
    """Name → inline SVG of every figure that the run has numbers for; `small_similarities` is a list of them."""
    found: dict[str, Any] = {}
    compared = [round_ for round_ in results.rounds if len(round_.names) > 1 and round_.similarity]
    with drawing():
        if results.tasks:
            found["scores"] = plots.scores(results)
        if any(client.loss is not None for round_ in results.rounds for client in round_.clients):
            found["losses"] = plots.losses(results)
        if compared:
            found |= _heat_maps(compared)
            if sum(compared[-1].conflict):
                found["conflict"] = plots.conflict(compared[-1])
        if results.scores:
            found["blocks"] = plots.blocks(results)
        if results.seconds:
            found["stages"] = plots.stages(results)
    return found


def _heat_maps(compared: list[Round]) -> dict[str, Any]:
    """The last round's similarity, and small ones for the rounds before if they are few."""
    if len(compared[-1].names) > _HEAT_MAP_CLIENTS:
        return {}
    limit = plots.similarity_limit(compared)
    few = len(compared) <= _SMALL_HEAT_MAPS and sum(len(each.names) ** 2 for each in compared) <= _SMALL_CELLS
    small = [plots.similarity(each, limit, small=True) for each in compared[:-1]] if few else []
    return {"similarity": plots.similarity(compared[-1], limit), "small_similarities": small}


def _precision(results: Results) -> str | None:
    """How far chance alone may move a score: the standard error of an accuracy is at most 0.5 / √n."""
    rows = [number for task in results.tasks if (number := results.rows(task))]
    return f"{50 / min(rows) ** 0.5:.1f}" if rows else None


def _settings(values: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings as titled groups of (name, value): plain values first, then a group for each table."""
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    plain = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            groups.append((key, [(name, _plain(entry)) for name, entry in value.items() if entry is not None]))
        elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            for index, entry in enumerate(value, 1):
                named = [(name, _plain(each)) for name, each in entry.items() if each is not None]
                groups.append((f"{key} {index}", named))
        elif value is not None:
            plain.append((key, _plain(value)))
    return ([("", plain)] if plain else []) + [group for group in groups if group[1]]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(entry) for entry in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
