"""LLM → proxy → adapter → LLM: an experiment becomes a run directory, every step of which survives a kill.

The method behind it, equation by equation, is docs/method.md.

The stages come in their order: `make_proxy`, `federate`, `fuse_run`, `evaluate_run`; `run` is all of them. Below is
what they begin with.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedproxy.artifacts import read_json, write_json
from fedproxy.compression.compress import Proxy, compress
from fedproxy.config import Experiment, clashes, load_experiment
from fedproxy.errors import ArtifactError, ConfigError, UsageError
from fedproxy.evaluation.experiment import check_tasks, score, scored_tasks
from fedproxy.federation.aligning import proxy_adapter, write_aligned
from fedproxy.federation.centralized import tune_centralized
from fedproxy.federation.client_rows import ClientRows, client_rows
from fedproxy.federation.fitting import check_experiment
from fedproxy.federation.inline import tune_inline
from fedproxy.federation.settings import check_settings
from fedproxy.federation.start import begin
from fedproxy.federation.store import RoundStore
from fedproxy.federation.tracking import check_trackers
from fedproxy.federation.tuning import OnProgress
from fedproxy.fusion.model_card import add_scores
from fedproxy.fusion.run import fuse_run
from fedproxy.held_back import example_prompt, score_llm
from fedproxy.models.quantization import four_bit
from fedproxy.privacy.accounting import require_accounting
from fedproxy.records import Results
from fedproxy.reporting.hindrances import hindrances
from fedproxy.run_directory import RunDirectory, has_members, owned
from fedproxy.run_results import results_of
from fedproxy.typed_json import as_record

if TYPE_CHECKING:
    from fedproxy.deployment.serving import Listen

OnSheet = Callable[[dict[str, Any]], None]

ENGINES = ("inline", "simulation", "deployment")


@dataclass(frozen=True)
class Run:
    """A federation's outcome.

    Attributes:
        path: The run directory.
        adapter: The tuned adapter of the proxy.
        rounds: The record (`round.json`) of every round.
    """

    path: Path
    adapter: Path
    rounds: list[dict[str, Any]]


def make_proxy(experiment: Experiment, out: Path, on_progress: OnProgress, on_sheet: OnSheet | None = None) -> Proxy:
    """Compress the LLM of an experiment as its [compress] and [heal] say; errors as of `compress`."""
    return compress(
        experiment.llm.path,
        out,
        **asdict(experiment.compress),
        seed=experiment.seed,
        heal=experiment.heal,
        trust_remote_code=experiment.llm.trust_remote_code,
        on_progress=lambda fraction, text: on_progress("compress", fraction, text),
        on_sheet=on_sheet,
    )


def federate(
    experiment: Experiment | str | Path,
    out: str | Path,
    *,
    engine: str = "inline",
    listen: "Listen | None" = None,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_sheet: OnSheet | None = None,
    on_ready: Callable[[str], None] | None = None,
    on_poll: Callable[[], None] | None = None,
) -> Run:
    """Compress the LLM and tune the proxy with the clients' data; every round is stored before the next begins.

    Args:
        experiment: An experiment file, or one loaded.
        out: The run directory.
        engine: "inline": all clients in this process. "simulation": in processes of Flower's simulation.
            "deployment": clients join over the network.
        listen: Where clients join, for the engine deployment.
        resume: Go on with a run begun earlier; it ends in the same bits as one that was never interrupted.
        overwrite: Replace an earlier run.
        on_progress: Told stage, fraction and text.
        on_sheet: Told the exposure sheet before the proxy is written.
        on_ready: Told the address that clients can join, by the engine deployment.
        on_poll: Called several times a second by the engines simulation and deployment.

    Returns:
        The outcome, whose `adapter` `fuse` takes.

    Raises:
        ConfigError, UsageError: the experiment or a path cannot be used.
        ArtifactError: the LLM or a client's data cannot be used.
        FederationError: a round has no quorum.
        ResourceError: the disk is full; what was complete stays.

    Example:
        `federate("experiment.toml", "runs/first").rounds[-1]["clients"]["bank"]["loss"]` → `0.41`
    """
    if engine not in ENGINES:
        raise UsageError(f'There is no engine "{engine}"; choose from {", ".join(ENGINES)}.')
    if (engine == "deployment") != (listen is not None):
        raise UsageError("The engine deployment, and only it, needs an address to listen at: use `fedproxy serve`.")
    experiment = read_experiment(experiment, remote=listen is not None)
    progress, poll = on_progress or _silent, on_poll or (lambda: None)
    how: Any = {"resume": resume, "overwrite": overwrite, "on_progress": progress, "on_sheet": on_sheet}
    if listen is not None:
        from fedproxy.deployment.serving import serve

        listen.check(experiment)
        with prepare(experiment, out, **how) as directory:
            _tune(directory, lambda: serve(experiment, directory, listen, on_ready or (lambda address: None), poll))
    elif engine == "simulation":
        from fedproxy.deployment.simulation import require_ray, simulate

        require_ray()
        with prepare(experiment, out, rows=client_rows(experiment), **how) as directory:
            _tune(directory, lambda: simulate(experiment, directory, poll))
    else:
        rows = client_rows(experiment)
        with _compressed(experiment, Path(out), rows, **how) as directory:
            _tune_here(experiment, directory, rows, progress)
    return Run(directory.path, directory.path / "adapter", RoundStore(directory.path / "rounds").records())


def _tune(directory: RunDirectory, rounds: Callable[[], None]) -> None:
    """Write RUN/adapter by the rounds of an engine, unless it is there."""
    if not (directory.path / "adapter").is_dir():
        with directory.stage("federate"):
            rounds()


def _tune_here(experiment: Experiment, directory: RunDirectory, rows: ClientRows, on_progress: OnProgress) -> None:
    _tune(directory, lambda: tune_inline(experiment, directory, rows, on_progress))
    write_aligned(directory)
    on_progress("federate", 1.0, "adapter written")


def evaluate_run(experiment: Experiment, path: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Score the models of a run asked for; each score is stored at once, so that a resumed run does not repeat it."""
    settings, tasks, stored = experiment.evaluate, scored_tasks(experiment), path / "evaluation.json"
    evaluation: dict[str, Any] = read_json(stored) if stored.is_file() else {}
    if not tasks:
        return evaluation
    llm, proxy = experiment.llm.path, path / "proxy"
    models: dict[str, tuple[str | Path, Path | None]] = {
        "llm": (llm, None),
        "proxy": (proxy, None),
        "proxy_tuned": (proxy, proxy_adapter(path)),
        "fused": (llm, path / "fused"),
        "proxy_tuning": (llm, path / "adapter"),
        "centralized": (llm, path / "centralized"),
    }
    wanted = [name for name in models if name in settings.models or (name == "centralized" and settings.centralized)]
    for index, name in enumerate(wanted):
        if name not in evaluation:
            evaluation[name] = score(
                experiment,
                tasks,
                *models[name],
                proxy=proxy if name == "proxy_tuning" else None,
                on_progress=lambda fraction, text, index=index, name=name: on_progress(  # type: ignore[misc]
                    "evaluate", (index + fraction) / len(wanted), f"{name} · {text}"
                ),
            )
            write_json(stored, evaluation)
    on_progress("evaluate", 1.0, "all scored")
    return evaluation


def run(
    experiment: Experiment | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_sheet: OnSheet | None = None,
) -> dict[str, Any]:
    """The whole job: compress, federate, fuse, tune centrally if asked for, evaluate.

    Where clients keep rows back, the LLM is scored on these, too, before and after tuning.

    Args:
        experiment: An experiment file, or one loaded.
        out: The run directory.
        resume: Go on with a run begun earlier, or with one whose rounds were served to clients elsewhere.
        overwrite: Replace an earlier run.
        on_progress: Told stage, fraction and text.
        on_sheet: Told the exposure sheet before the proxy is written.

    Returns:
        What results.json holds.

    Raises:
        FedproxyError: as of `federate` and `evaluate`.

    Example:
        `run("experiment.toml", "runs/first")["evaluation"]["fused"]["average"]` → `0.91`
    """
    progress, path = on_progress or _silent, Path(out)
    served = resume and has_members(path)
    experiment = read_experiment(experiment, remote=served)
    if served:
        _check_served(experiment, path)
    rows = ClientRows({}) if served else client_rows(experiment)
    check_tasks(experiment)
    how: Any = {"resume": resume, "overwrite": overwrite, "on_progress": progress, "on_sheet": on_sheet}
    with _compressed(experiment, path, rows, **how) as directory:
        _tune_here(experiment, directory, rows, progress)
        if not (path / "fused").is_dir():
            with directory.stage("fuse"):
                fuse_run(experiment, path, progress)
        progress("fuse", 1.0, "adapter re-keyed")
        held_back = score_llm(experiment, directory, rows, progress)
        if experiment.evaluate.centralized:
            if not (path / "centralized").is_dir():
                with directory.stage("centralized"):
                    tune_centralized(experiment, directory, rows, progress)
            progress("centralized", 1.0, "upper bound tuned")
        with directory.stage("evaluate"):
            evaluation = evaluate_run(experiment, path, progress)
        add_scores(path / "fused", evaluation)
        results = results_of(experiment, directory, evaluation, held_back)
        results["prompt"] = example_prompt(experiment, rows)
        results["hindrances"] = _hindrances(results)
        for found in results["hindrances"]:
            directory.event("hindrance", **found)
        write_json(path / "results.json", results)
        return results


def _hindrances(results: dict[str, Any]) -> list[dict[str, str]]:
    """What holds the result back; nothing of results that no page can be made of, as whoever reads them is told."""
    with contextlib.suppress(ArtifactError):
        return [asdict(found) for found in hindrances(as_record(results, Results, "results"))]
    return []


@contextlib.contextmanager
def prepare(
    experiment: Experiment | str | Path,
    out: str | Path,
    *,
    rows: ClientRows | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_sheet: OnSheet | None = None,
) -> Iterator[RunDirectory]:
    """Begin a run that is carried elsewhere: the proxy and the fresh adapter.

    `rows` are the clients', to be checked, if they are here; the other arguments, and errors, are as of `federate`.

    Yields:
        The run directory, owned until the block ends.
    """
    experiment = read_experiment(experiment, remote=rows is None)
    if experiment.heal.realign_steps:
        raise UsageError(
            f"[heal] realign_steps = {experiment.heal.realign_steps} changes the proxy between rounds, which only "
            "the engine inline can. Choose it, or 0."
        )
    progress = on_progress or _silent
    how: Any = {"resume": resume, "overwrite": overwrite, "on_progress": progress, "on_sheet": on_sheet}
    with _compressed(experiment, Path(out), rows or ClientRows({}), **how) as directory:
        begin(experiment, directory)
        yield directory


@contextlib.contextmanager
def _compressed(
    experiment: Experiment,
    run: Path,
    rows: ClientRows,
    *,
    resume: bool,
    overwrite: bool,
    on_progress: OnProgress,
    on_sheet: OnSheet | None,
) -> Iterator[RunDirectory]:
    """A run, owned until the block ends, with its proxy; one that is gone on with, and has its proxy, was checked."""
    if overwrite or not (run / "proxy").is_dir():
        check_experiment(experiment, rows)
    with owned(run, experiment, resume=resume, overwrite=overwrite) as directory:
        if not (run / "proxy").is_dir():
            with directory.stage("compress"):
                make_proxy(experiment, run / "proxy", on_progress, on_sheet)
        on_progress("compress", 1.0, "proxy written")
        directory.check_same_rows(rows.whole)
        yield directory


def read_experiment(experiment: Experiment | str | Path, *, remote: bool = False) -> Experiment:
    """Load and check an experiment file, or check a loaded one. With `remote` the data lie elsewhere.

    Raises:
        ConfigError: anything in it is wrong; all problems are in the error.
        UsageError: a tracker, or what reckons the cost of privacy, is not installed, or weights of four bits cannot be
            had on this machine.
    """
    if not isinstance(experiment, Experiment):
        experiment = load_experiment(Path(experiment), remote=remote)
    elif problems := clashes(experiment):
        raise ConfigError("The experiment", problems)
    check_settings(experiment.federate, experiment.client_names)
    check_trackers(experiment.train.report_to)
    if experiment.train.privacy is not None and not remote:
        require_accounting()
    if experiment.train.quantization == "4bit":
        four_bit()  # whether it can be had here
    return experiment


def _check_served(experiment: Experiment, run: Path) -> None:
    """Check that what is left of a run that was served needs no client's data.

    Raises:
        UsageError: it does.
    """
    if not (run / "adapter").is_dir():
        raise UsageError(f"{run}: rounds are left, and its clients are elsewhere. Go on with: fedproxy serve --resume")
    if experiment.evaluate.centralized:
        raise UsageError("[evaluate] centralized = true tunes on the clients' pooled data, which are elsewhere.")


def _silent(stage: str, fraction: float, text: str) -> None:
    pass
