"""The run as one self-contained HTML page: no network, light and dark, from phone to wide screen; script only sorts."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedproxy import foreign
from fedproxy.artifacts import SHAPING, inside
from fedproxy.attack_records import FROM_PROXY, Attacks, read_attacks
from fedproxy.events import event_of
from fedproxy.records import MODELS, Results, Round, read_run
from fedproxy.reporting import exposure, heat_maps, plots, validation
from fedproxy.reporting.attacks import interval
from fedproxy.reporting.conflict import Conflict, load_conflict
from fedproxy.reporting.hindrances import hindrances
from fedproxy.reporting.html import fill, write_page
from fedproxy.reporting.summary import sentences, tuned_llm
from fedproxy.reporting.svg import drawing
from fedproxy.reporting.units import duration
from fedproxy.reporting.use_it import use_it

EVENTS = 500
_VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,5}((a|b|rc|\.post|\.dev)[0-9]{1,9}){0,3}(\+[a-z0-9.]{1,40})?")
"""As of PEP 440."""


def report(run_dir: Path | str) -> Path:
    """Write RUN/report.html from RUN/results.json, what the rounds left, and RUN/attacks.json.

    Args:
        run_dir: The folder of a finished run.

    Returns:
        The page's path.

    Raises:
        ArtifactError: results.json or a round's conflict is missing or damaged, attacks.json is damaged, or a link
            leads out of the run.
        MissingExtraError: the extra `report` is not installed.
        UsageError: the page cannot be written.

    Example:
        `report("runs/first")` → `Path("runs/first/report.html")`
    """
    run_dir = Path(run_dir)
    results = read_run(run_dir)
    conflicts = load_conflict(run_dir, results.proxy.layer_map) if results.proxy.layer_map else []
    html = render(
        results,
        events=load_events(run_dir),
        run=run_dir.name or "RUN",
        conflicts=conflicts,
        attacks=read_attacks(run_dir),
        use=use_it(results, run_dir),
    )
    path = run_dir / "report.html"
    write_page(path, html)
    return path


def render(
    results: Results,
    *,
    events: Sequence[dict[str, Any]],
    run: str,
    conflicts: Sequence[Conflict] = (),
    attacks: Attacks | None = None,
    use: str = "",
    status: str = "",
    live: bool = False,
) -> str:
    """The page.

    Args:
        results: The run.
        events: What happened, in order; the last `EVENTS` are shown.
        run: Name of the run's folder, for the commands that reproduce it.
        conflicts: Conflict by block, of the rounds that have it.
        attacks: What attacks on the run found, if it was attacked.
        use: Code that asks the tuned LLM.
        status: What is happening, if the run is not complete.
        live: Whether the page is to look for newer ones.

    Raises:
        MissingExtraError: the extra `report` is not installed.
    """
    figures = _figures(results, conflicts)
    compared = compared_rounds(results.rounds)
    agreement = any(len(round_.analysis.names) > 1 for round_ in results.rounds)
    held_back = [] if live else hindrances(results)
    contents = [
        "Summary",
        "What holds it back",
        "Results",
        "Use it",
        "Validation",
        "Rounds",
        "Agreement",
        "Compression",
        "Exposure",
        "Attacks",
        "Cost",
        "Settings",
        "Reproduce",
    ]
    validated = validation.rounds_of(results)
    attacks = attacks or Attacks()
    exposed = "" if live else exposure.held(results)
    optional = (
        ("What holds it back", held_back),
        ("Use it", use),
        ("Validation", validated),
        ("Agreement", agreement),
        ("Compression", "blocks" in figures),
        ("Exposure", exposed),
        ("Attacks", attacks.attacks),
    )
    left_out = [name for name, there in optional if not there]
    return fill(
        "run.html.j2",
        status=status,
        live=live,
        title=results.name,
        contents=[name for name in contents if name not in left_out],
        results=results,
        models=MODELS,
        sentences=sentences(results),
        held_back=held_back,
        figures=figures,
        validated=validated,
        stated=validation.scored_models(validated),
        use=use,
        reached=validation.reached(results),
        tuned_llm=tuned_llm(results),
        llm_path=argument(results.llm.path) if results.llm.path else "LLM",
        kept=results.kept,
        compared=compared[-1] if compared else None,
        conflicts=conflicts,
        exposed=exposed,
        quoted=exposure.quoted(attacks),
        measuring=f"fedproxy audit {argument(run)} --attack {FROM_PROXY}",
        attacks=attacks.attacks,
        interval=interval,
        settings=grouped(results.experiment),
        environment=grouped(results.environment),
        precision=_precision(results),
        events=[", ".join(f"{key}: {value}" for key, value in event.items()) for event in events[-EVENTS:]],
        run=argument(run),
        pins=pins(results.environment),
    )


def _figures(results: Results, conflicts: Sequence[Conflict]) -> dict[str, Any]:
    """Name → inline SVG of every figure that the run has numbers for; `small_similarities` is a list of them."""
    found: dict[str, Any] = {}
    compared, rounds = compared_rounds(results.rounds), results.rounds
    with drawing():
        found |= validation.figures(validation.rounds_of(results))
        if results.tasks:
            found["scores"] = plots.points(
                {
                    MODELS[model]: [*map(scored.tasks.get, results.tasks), scored.average]
                    for model, scored in results.evaluation.items()
                },
                [*results.tasks, "Mean"],
                name="scores",
                title="Score by task and model",
                text="Points: score of every model on each task and in the mean; numbers in the table above.",
                own=MODELS["fused"],
            )
        for field in plots.QUANTITIES:
            if plots.has(rounds, field) and not (field == "bytes_up" and _same_in_all(rounds, field)):
                found[field] = plots.by_round(rounds, field)
        if compared:
            found |= heat_maps.similarities(compared)
            if sum(compared[-1].analysis.conflict_histogram):
                found["conflict"] = plots.conflict(compared[-1])
            if conflicts:
                found["conflict_blocks"] = heat_maps.conflict_by_block(conflicts)
                found["conflict_layers"] = heat_maps.conflict_by_layer(conflicts[-1])
        if results.proxy.scores:
            score = results.setting("compress", "score")
            found["blocks"] = plots.blocks(results.proxy, score if isinstance(score, str) else "score")
        if seconds := results.cost.seconds:
            found["stages"] = plots.bars(
                list(seconds),
                {"seconds": list(seconds.values())},
                list(map(duration, seconds.values())),
                name="stages",
                title="Time by stage",
                axis="wall-clock time (s)",
                row=0.32,
            )
        if (drawn := plots.traffic(rounds)) is not None:
            found["traffic"] = drawn
    return found


def compared_rounds(rounds: Sequence[Round]) -> list[Round]:
    """The rounds in which updates were compared."""
    return [each for each in rounds if len(each.analysis.names) > 1 and each.analysis.similarity]


def _same_in_all(rounds: Sequence[Round], field: str) -> bool:
    return len({getattr(client, field) for round_ in rounds for client in round_.clients.values()}) == 1


def load_events(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of RUN/events.jsonl that are JSON objects; a last line cut short by a crash is left out.

    Raises:
        ArtifactError: it is a link that leads out of the run.
    """
    path = inside(Path(run_dir), "events.jsonl")
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [event for line in lines if (event := event_of(line))]


def pins(environment: Mapping[str, Any]) -> str:
    """What pip installs to get the run's versions: of the packages that shape results, what is a version.

    A local label, such as that of torch for CPUs, is left out: PyPI has no such release.

    Example:
        >>> pins({"versions": {"torch": "2.13.0+cpu", "peft": "1; rm -rf ~", "other": "1.0"}})
        'torch==2.13.0'
    """
    found = environment.get("versions")
    held = {name: str(found.get(name)) for name in SHAPING} if isinstance(found, Mapping) else {}
    return " ".join(
        f"{name}=={version.partition('+')[0]}" for name, version in held.items() if _VERSION.fullmatch(version)
    )


def argument(path: str) -> str:
    """A path as an argument, and no option, on the one line of a command.

    Example:
        >>> argument("my run"), argument("-x")
        ("'my run'", './-x')
    """
    path = foreign.plain(path)
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


def _precision(results: Results) -> str | None:
    """How far chance alone may move a score: the standard error of an accuracy is at most 0.5 / √n."""
    rows = [number for task in results.tasks if (number := results.rows(task))]
    return f"{50 / min(rows) ** 0.5:.1f}" if rows else None


def grouped(values: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings as titled groups of (name, value): plain values first, then a group for each table."""
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    top = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            groups.append((key, [(name, plain(entry)) for name, entry in value.items() if entry is not None]))
        elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            for index, entry in enumerate(value, 1):
                named = [(name, plain(each)) for name, each in entry.items() if each is not None]
                groups.append((f"{key} {index}", named))
        elif value is not None:
            top.append((key, plain(value)))
    return ([("", top)] if top else []) + [group for group in groups if group[1]]


def plain(value: Any) -> str:
    """A setting's value as people write it."""
    if isinstance(value, list):
        return ", ".join(plain(entry) for entry in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
