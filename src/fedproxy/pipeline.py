"""The stages put together: an experiment becomes a run directory, every step of which survives a kill."""

import contextlib
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedproxy.aggregation.merge import RULES, merge
from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.aggregation.space import SPACES
from fedproxy.artifacts import Manifest, new_directory, read_json, write_json
from fedproxy.checkpoint_files import model_identity, weight_files
from fedproxy.compression import SCORES, Proxy, compress
from fedproxy.config import Experiment, clashes, load_experiment
from fedproxy.errors import ConfigError, UsageError
from fedproxy.evaluation import evaluate, load_for_evaluation
from fedproxy.federation.aligning import ALIGNED, write_aligned
from fedproxy.federation.client_rows import ClientRows, client_rows, encode_for
from fedproxy.federation.fitting import check_experiment
from fedproxy.federation.inline import tune_inline
from fedproxy.federation.merge_files import merge_files
from fedproxy.federation.settings import check_settings
from fedproxy.federation.store import RoundStore
from fedproxy.federation.tracking import check_trackers
from fedproxy.federation.tuning import OnProgress, adapter_manifest, begin, load_proxy, steps_of_all
from fedproxy.federation.wire import ENCODINGS
from fedproxy.fusion import fuse
from fedproxy.fusion.model_card import add_scores
from fedproxy.metrics import gap_closed
from fedproxy.models.checkpoints import padding, resolve
from fedproxy.models.lora import adapter_state, write_adapter
from fedproxy.models.quantization import four_bit
from fedproxy.models.training import DivergedError, train
from fedproxy.reporting import compare_runs, is_comparison, report, report_comparison, results_table, totals_table
from fedproxy.run_directory import RunDirectory, environment, has_members, owned
from fedproxy.seeds import derive_seed
from fedproxy.tensor_files import read_header

if TYPE_CHECKING:
    from fedproxy.deployment.serving import Listen

__all__ = [
    "Proxy",
    "Run",
    "compare_runs",
    "compress",
    "environment",
    "evaluate",
    "federate",
    "fuse",
    "gap_closed",
    "is_comparison",
    "merge",
    "merge_files",
    "register_encoding",
    "register_regulariser",
    "register_rule",
    "register_score",
    "register_space",
    "report",
    "report_comparison",
    "results_table",
    "run",
    "totals_table",
]

OnSheet = Callable[[dict[str, Any]], None]

register_rule, register_score, register_regulariser = RULES.register, SCORES.register, REGULARISERS.register
register_space, register_encoding = SPACES.register, ENCODINGS.register

ENGINES = ("inline", "simulation", "deployment")


def read_experiment(experiment: Experiment | str | Path, *, remote: bool = False) -> Experiment:
    """Load and check an experiment file, or check a loaded one. With `remote` the data lie elsewhere.

    Raises:
        ConfigError: anything in it is wrong; all problems are in the error.
        UsageError: a tracker is not installed, or weights of four bits cannot be had on this machine.
    """
    if not isinstance(experiment, Experiment):
        experiment = load_experiment(Path(experiment), remote=remote)
    elif problems := clashes(experiment):
        raise ConfigError("The experiment", problems)
    check_settings(experiment.federate)
    check_trackers(experiment.train.report_to)
    if experiment.train.quantization == "4bit":
        four_bit()  # whether it can be had here
    return experiment


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


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _silent(stage: str, fraction: float, text: str) -> None:
    pass


def make_proxy(experiment: Experiment, out: Path, on_progress: OnProgress, on_sheet: OnSheet | None = None) -> Proxy:
    """Compress the LLM of an experiment as its [compress] and [heal] say; errors as of `compress`."""
    settings = experiment.compress
    return compress(
        experiment.llm.path,
        out,
        remove=settings.remove,
        calibration=settings.calibration,
        score=settings.score,
        keep_first=settings.keep_first,
        keep_last=settings.keep_last,
        samples=settings.samples,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        seed=experiment.seed,
        placement=settings.placement,
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
            if not (directory.path / "adapter").is_dir():
                with directory.stage("federate"):
                    serve(experiment, directory, listen, on_ready or (lambda address: None), poll)
    elif engine == "simulation":
        from fedproxy.deployment.simulation import require_ray, simulate

        require_ray()
        with prepare(experiment, out, rows=client_rows(experiment), **how) as directory:
            if not (directory.path / "adapter").is_dir():
                with directory.stage("federate"):
                    simulate(experiment, directory, poll)
    else:
        rows = client_rows(experiment)
        _check(experiment, Path(out), rows, overwrite)
        with owned(Path(out), experiment, resume=resume, overwrite=overwrite) as directory:
            _federate(experiment, directory, rows, progress, on_sheet)
    return Run(directory.path, directory.path / "adapter", RoundStore(directory.path / "rounds").records())


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
    experiment = read_experiment(experiment)
    if experiment.heal.realign_steps:
        raise UsageError(
            f"[heal] realign_steps = {experiment.heal.realign_steps} changes the proxy between rounds, which only "
            "the engine inline can. Choose it, or 0."
        )
    _check(experiment, Path(out), rows or ClientRows({}), overwrite)
    with owned(Path(out), experiment, resume=resume, overwrite=overwrite) as directory:
        _proxy(experiment, directory, on_progress or _silent, on_sheet)
        begin(experiment, directory)
        yield directory


def _check(experiment: Experiment, run: Path, rows: ClientRows, overwrite: bool) -> None:
    """See `check_experiment`; a run that is gone on with, and has its proxy, was checked."""
    if overwrite or not (run / "proxy").is_dir():
        check_experiment(experiment, rows)


def _proxy(experiment: Experiment, directory: RunDirectory, on_progress: OnProgress, on_sheet: OnSheet | None) -> None:
    if not (directory.path / "proxy").is_dir():
        with directory.stage("compress"):
            make_proxy(experiment, directory.path / "proxy", on_progress, on_sheet)
    on_progress("compress", 1.0, "proxy written")


def _federate(
    experiment: Experiment,
    directory: RunDirectory,
    rows: ClientRows,
    on_progress: OnProgress,
    on_sheet: OnSheet | None,
) -> None:
    _proxy(experiment, directory, on_progress, on_sheet)
    if not (directory.path / "adapter").is_dir():
        with directory.stage("federate"):
            tune_inline(experiment, directory, rows, on_progress)
    write_aligned(directory)
    on_progress("federate", 1.0, "adapter written")


def _centralized(experiment: Experiment, directory: RunDirectory, rows: ClientRows, on_progress: OnProgress) -> None:
    """Tune the LLM itself on the pooled rows, with as many optimizer steps as all clients took together."""
    llm = resolve(experiment.llm.path)
    tokenizer, examples = encode_for(llm, rows, experiment)
    settings = replace(experiment.train, blocks="all")
    model = load_proxy(replace(experiment, train=settings), llm)
    try:
        train(
            model,
            [example for name in sorted(examples) for example in examples[name]],
            settings,
            pad=padding(tokenizer),
            seed=derive_seed(experiment.seed, "centralized"),
            steps=steps_of_all(experiment, {name: len(part) for name, part in examples.items()}),
            on_step=lambda step, total, loss: on_progress(
                "centralized", step / total, f"step {step}/{total} · loss {loss:.3f}"
            ),
        )
    except DivergedError as error:
        raise UsageError(f"[evaluate] centralized: {error}") from error
    source = Manifest.read(directory.path / "proxy")
    with new_directory(directory.path / "centralized") as folder:
        manifest = adapter_manifest(source, "llm-adapter", list(range(source.llm_blocks)), experiment)
        write_adapter(folder, model, adapter_state(model), manifest)


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
        As `federate` and `evaluate`.

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
    _check(experiment, path, rows, overwrite)
    with owned(path, experiment, resume=resume, overwrite=overwrite) as directory:
        _federate(experiment, directory, rows, progress, on_sheet)
        if not (path / "fused").is_dir():
            with directory.stage("fuse"):
                fuse_run(experiment, path, progress)
        progress("fuse", 1.0, "adapter re-keyed")
        if experiment.evaluate.centralized:
            if not (path / "centralized").is_dir():
                with directory.stage("centralized"):
                    _centralized(experiment, directory, rows, progress)
            progress("centralized", 1.0, "upper bound tuned")
        with directory.stage("evaluate"):
            evaluation = _evaluate(experiment, directory, progress)
        add_scores(path / "fused", evaluation)
        results = _results(experiment, directory, evaluation)
        write_json(path / "results.json", results)
        return results


def fuse_run(experiment: Experiment, path: Path, on_progress: OnProgress) -> None:
    """Write RUN/fused from RUN/adapter, as [fuse] says; errors as of `fuse`."""
    fuse(
        experiment.llm.path,
        path / "adapter",
        path / "fused",
        scale=experiment.fuse.scale,
        public=experiment.fuse.public or None,
        proxy=path / "proxy",
        trust_remote_code=experiment.llm.trust_remote_code,
        on_progress=lambda fraction, text: on_progress("fuse", fraction, text),
    )


def _check_served(experiment: Experiment, run: Path) -> None:
    """Check that what is left of a run that was served needs no client's data.

    Raises:
        UsageError: it does.
    """
    if not (run / "adapter").is_dir():
        raise UsageError(f"{run}: rounds are left, and its clients are elsewhere. Go on with: fedproxy serve --resume")
    if experiment.evaluate.centralized:
        raise UsageError("[evaluate] centralized = true tunes on the clients' pooled data, which are elsewhere.")


def scored_tasks(experiment: Experiment) -> list[str]:
    """The tasks that models are scored on: those of [evaluate], or the clients'."""
    cut = experiment.partition
    own = [client.task for client in experiment.client] if cut is None else [cut.task]
    return experiment.evaluate.tasks or list(dict.fromkeys(task for task in own if task))


def check_tasks(experiment: Experiment) -> None:
    """Load the tasks that will be scored once before anything else, so that a fault in them shows before the training.

    Raises:
        UsageError: a task is unknown.
        ArtifactError: its rows cannot be read.
    """
    settings = experiment.evaluate
    if tasks := scored_tasks(experiment):
        data, include = (Path(folder) if folder else None for folder in (settings.data, settings.include))
        load_for_evaluation(tasks, data=data, include=include)


def _evaluate(experiment: Experiment, directory: RunDirectory, on_progress: OnProgress) -> dict[str, Any]:
    """Score the models asked for; each score is stored at once, so that a resumed run does not repeat it."""
    settings, path, tasks = experiment.evaluate, directory.path, scored_tasks(experiment)
    stored = path / "evaluation.json"
    evaluation: dict[str, Any] = read_json(stored) if stored.is_file() else {}
    if not tasks:
        return evaluation
    llm = experiment.llm.path
    tuned = path / ALIGNED if (path / ALIGNED).is_dir() else path / "adapter"
    models: dict[str, tuple[str | Path, Path | None]] = {
        "llm": (llm, None),
        "proxy": (path / "proxy", None),
        "proxy_tuned": (path / "proxy", tuned),
        "fused": (llm, path / "fused"),
        "proxy_tuning": (llm, path / "adapter"),
        "centralized": (llm, path / "centralized"),
    }
    wanted = [name for name in models if name in settings.models or (name == "centralized" and settings.centralized)]
    for index, name in enumerate(wanted):
        if name not in evaluation:
            checkpoint, adapter = models[name]
            evaluation[name] = evaluate(
                checkpoint,
                tasks=tasks,
                data=settings.data or None,
                include=settings.include or None,
                adapter=adapter,
                proxy=path / "proxy" if name == "proxy_tuning" else None,
                limit=settings.limit,
                batch_size=settings.batch_size,
                trust_remote_code=experiment.llm.trust_remote_code,
                on_progress=lambda fraction, text, index=index, name=name: on_progress(  # type: ignore[misc]
                    "evaluate", (index + fraction) / len(wanted), f"{name} · {text}"
                ),
            )
            write_json(stored, evaluation)
    on_progress("evaluate", 1.0, "all scored")
    return evaluation


def _count_parameters(checkpoint: Path) -> int:
    return sum(
        prod(shape) for file in weight_files(checkpoint) for _, shape, _, _ in read_header(file).entries.values()
    )


def _results(experiment: Experiment, directory: RunDirectory, evaluation: dict[str, Any]) -> dict[str, Any]:
    path, llm = directory.path, resolve(experiment.llm.path)
    proxy = Manifest.read(path / "proxy")
    rounds = RoundStore(path / "rounds").records()
    replies = [client for record in rounds for client in record["clients"].values()]
    return {
        "name": experiment.name,
        "seed": experiment.seed,
        "llm": {
            "path": experiment.llm.path,
            "blocks": proxy.llm_blocks,
            "parameters": _count_parameters(llm),
            "sha256": model_identity(llm),
        },
        "proxy": {
            "blocks": len(proxy.layer_map),
            "parameters": _count_parameters(path / "proxy"),
            "layer_map": proxy.layer_map,
            "scores": proxy.scores,
        },
        "evaluation": evaluation,
        "gap_closed": gap_closed(evaluation),
        "rounds": rounds,
        "cost": {
            "seconds": directory.seconds(),
            "bytes_up": sum(client["bytes_up"] for client in replies),
            "bytes_down": sum(client["bytes_down"] for client in replies),
            "proxy_bytes": sum(file.stat().st_size for file in weight_files(path / "proxy")),
            "peak_memory_bytes": _peak_memory(),
        },
        "environment": read_json(path / "environment.json"),
        "experiment": experiment.as_dict(),
    }
