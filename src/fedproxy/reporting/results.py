"""A run's `results.json` as checked, typed values: what the page, the plots and the tables are made of.

Parts that a run did not produce are None or empty; a part of the wrong type is an `ArtifactError` that says where.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedproxy.artifacts import event_of, read_json
from fedproxy.errors import ArtifactError
from fedproxy.metrics import main_metric
from fedproxy.reporting.checked import Part, is_number, short

MODELS = {
    "llm": "LLM",
    "proxy": "Proxy",
    "proxy_tuned": "Tuned proxy",
    "fused": "Fused LLM",
    "proxy_tuning": "LLM with decode-time proxy tuning",
    "centralized": "Centralized",
}


@dataclass(frozen=True)
class Evaluation:
    """What one model scored.

    Attributes:
        tasks: Task → its main metric, a share of 1 of which more is better.
        left_out: Task → its main metric where it is another quantity, and why it is in no mean.
        rows: Task → number of rows scored.
        average: Mean over the tasks.
    """

    tasks: dict[str, float]
    left_out: dict[str, tuple[float, str]]
    rows: dict[str, int]
    average: float | None


@dataclass(frozen=True)
class ClientRound:
    """One client in one round; None where the run has no value (a quarantined client has no weight)."""

    name: str
    rows: int | None
    loss: float | None
    seconds: float | None
    tokens_per_second: float | None
    peak_memory: int | None
    wire: str
    bytes_up: int | None
    bytes_down: int | None
    heterogeneity: float | None
    weight: float | None
    retention: float | None


@dataclass(frozen=True)
class Round:
    """One round of the federation.

    Attributes:
        number: Counted from 1.
        clients: Every client that trained, in the run's order.
        quarantined: Client → why its update was left out.
        names: The merged clients: rows and columns of `similarity`.
        similarity: Cosine of each two updates.
        conflict: Number of coordinates with conflict 0, 1/K, …, 1.
        conflict_mean: Mean conflict of all coordinates.
        seconds: Wall-clock time.
    """

    number: int
    clients: list[ClientRound]
    quarantined: dict[str, str]
    names: list[str]
    similarity: list[list[float]]
    conflict: list[int]
    conflict_mean: float | None
    seconds: float | None


@dataclass(frozen=True)
class Results:
    """Everything known of a run.

    Attributes:
        name: The experiment's name.
        evaluation: Key of `MODELS` → scores, in the order of `MODELS`, only those evaluated.
        rounds: In order.
        seed: The experiment's.
        llm_sha256: Identity of the LLM; empty if it was not recorded.
        llm_blocks, llm_parameters, proxy_parameters: Sizes.
        layer_map: LLM block of each proxy block, 0-based.
        scores: Score of every LLM block.
        seconds: Stage → wall-clock time.
        bytes_up, bytes_down: Sent by all clients to the server in all rounds, and the other way.
        proxy_bytes: Size of the proxy, sent to each client once.
        peak_memory: Bytes.
        environment, experiment: As the run recorded them.
    """

    name: str
    evaluation: dict[str, Evaluation]
    rounds: list[Round]
    seed: int | None
    llm_sha256: str
    llm_blocks: int | None
    llm_parameters: int | None
    proxy_parameters: int | None
    layer_map: list[int]
    scores: list[float]
    seconds: dict[str, float]
    bytes_up: int | None
    bytes_down: int | None
    proxy_bytes: int | None
    peak_memory: int | None
    environment: dict[str, Any]
    experiment: dict[str, Any]

    @property
    def tasks(self) -> list[str]:
        """Every task that a model was scored on, in the order of the first model that has it."""
        return list(dict.fromkeys(task for scored in self.evaluation.values() for task in scored.tasks))

    @property
    def left_out(self) -> dict[str, str]:
        """Task → why some model's value of it is in no mean."""
        return {task: why for scored in self.evaluation.values() for task, (_, why) in scored.left_out.items()}

    def rows(self, task: str) -> int | None:
        """Number of rows of a task."""
        return next((scored.rows[task] for scored in self.evaluation.values() if task in scored.rows), None)

    @property
    def clients(self) -> list[str]:
        """Every client that trained, in the order of the rounds."""
        return list(dict.fromkeys(client.name for round_ in self.rounds for client in round_.clients))

    @property
    def exposed(self) -> float | None:
        """Parameters of the proxy, which every client has, as a share of the LLM's."""
        if not self.llm_parameters or self.proxy_parameters is None:
            return None
        return self.proxy_parameters / self.llm_parameters

    def setting(self, table: str, key: str) -> Any:
        """A value of the experiment, or None."""
        values = self.experiment.get(table)
        return values.get(key) if isinstance(values, dict) else None

    @property
    def gap_closed(self) -> float | None:
        """See `gap_closed`."""
        return gap_closed(
            {
                model: {"average": scored.average, "left_out": scored.left_out}
                for model, scored in self.evaluation.items()
            }
        )

    def average(self, model: str) -> float | None:
        """A model's mean score, or None if it was not evaluated."""
        return self.evaluation[model].average if model in self.evaluation else None


def gap_closed(evaluation: Mapping[str, Any]) -> float | None:
    """Share of the way from the untuned LLM to centralized tuning that the fused LLM went.

    (fused − llm) / (centralized − llm), of the averages; None where one of the three is missing, where they are not of
    the same tasks, or where centralized tuning is no better than the untuned LLM, so that there is no gap.

    Args:
        evaluation: `evaluation` of a results.json.

    Example:
        >>> gap_closed({"llm": {"average": 0.2}, "fused": {"average": 0.5}, "centralized": {"average": 0.6}})
        0.75
    """
    compared = [evaluation.get(model) or {} for model in ("llm", "fused", "centralized")]
    llm, fused, centralized = (scores.get("average") for scores in compared)
    if llm is None or fused is None or centralized is None or centralized - llm < 1e-9:
        return None
    if len({frozenset(scores.get("left_out", ())) for scores in compared}) > 1:
        return None
    return round(float((fused - llm) / (centralized - llm)), 12)


def _evaluation(part: Part) -> Evaluation:
    scores, left_out, rows = {}, {}, {}
    tasks, reasons = part.part("tasks"), part.part("left_out")
    for task in tasks.value:
        entry = tasks.part(task)
        metrics = [key for key, value in entry.value.items() if key != "n" and is_number(value)]
        if not metrics:
            raise ArtifactError(f"{entry.place} holds no metric.")
        value = float(entry.value[main_metric(metrics)])
        if why := reasons.text(task, ""):
            left_out[task] = value, why
        else:
            scores[task] = value
        number = entry.integer("n")
        if number is not None:
            rows[task] = number
    average = part.number("average")
    if average is None and scores:
        average = sum(scores.values()) / len(scores)
    return Evaluation(scores, left_out, rows, average)


def _round(part: Part, number: int) -> Round:
    analysis, clients = part.part("analysis"), part.part("clients")
    names = [str(name) for name in analysis.items("names")]
    columns = {
        key: dict(zip(names, analysis.numbers(key), strict=False)) for key in ("heterogeneity", "weights", "retention")
    }
    similarity = analysis.items("similarity")
    if len(similarity) not in (0, len(names)):
        raise ArtifactError(f"{analysis.place}.similarity has {len(similarity)} rows, expected {len(names)}.")
    for row in similarity:
        if not isinstance(row, list) or len(row) != len(names) or not all(is_number(value) for value in row):
            raise ArtifactError(f"{analysis.place}.similarity has the row {short(row)}, expected {len(names)} numbers.")
        if any(abs(value) > 1.001 for value in row):
            raise ArtifactError(f"{analysis.place}.similarity has the row {short(row)}, expected cosines from -1 to 1.")
    quarantined = {}
    for index, entry in enumerate(part.items("quarantined")):
        reject = Part(entry, f"{part.place}.quarantined[{index}]")
        quarantined[reject.text("client", "?")] = reject.text("reason", "no reason recorded")
    found = []
    for name in clients.value:
        client = clients.part(name)
        found.append(
            ClientRound(
                name=name,
                rows=client.integer("rows"),
                loss=client.number("loss"),
                seconds=client.number("seconds"),
                tokens_per_second=client.number("tokens_per_second"),
                peak_memory=client.integer("peak_memory_bytes"),
                wire=client.text("wire", ""),
                bytes_up=client.integer("bytes_up"),
                bytes_down=client.integer("bytes_down"),
                heterogeneity=columns["heterogeneity"].get(name),
                weight=columns["weights"].get(name),
                retention=columns["retention"].get(name),
            )
        )
    return Round(
        number=part.integer("round") or number,
        clients=found,
        quarantined=quarantined,
        names=names,
        similarity=similarity,
        conflict=[int(value) for value in analysis.numbers("conflict_histogram")],
        conflict_mean=analysis.number("conflict_mean"),
        seconds=part.number("seconds"),
    )


def parse(raw: Any, source: str = "results") -> Results:
    """Check a results object and give it types.

    Args:
        raw: What results.json holds.
        source: Its name in messages.

    Raises:
        ArtifactError: a part has the wrong type.
    """
    part = Part(raw, source)
    evaluation, cost, seconds = part.part("evaluation"), part.part("cost"), part.part("cost").part("seconds")
    llm, proxy = part.part("llm"), part.part("proxy")
    return Results(
        name=part.text("name", "run"),
        evaluation={key: _evaluation(evaluation.part(key)) for key in MODELS if evaluation.value.get(key) is not None},
        rounds=[
            _round(Part(entry, f"{source}.rounds[{index}]"), index + 1)
            for index, entry in enumerate(part.items("rounds"))
        ],
        seed=part.integer("seed"),
        llm_sha256=llm.text("sha256", ""),
        llm_blocks=llm.integer("blocks"),
        llm_parameters=llm.integer("parameters"),
        proxy_parameters=proxy.integer("parameters"),
        layer_map=[int(block) for block in proxy.numbers("layer_map")],
        scores=proxy.numbers("scores"),
        seconds={stage: value for stage in seconds.value if (value := seconds.number(stage)) is not None},
        bytes_up=cost.integer("bytes_up"),
        bytes_down=cost.integer("bytes_down"),
        proxy_bytes=cost.integer("proxy_bytes"),
        peak_memory=cost.integer("peak_memory_bytes"),
        environment=part.part("environment").value,
        experiment=part.part("experiment").value,
    )


def load(run_dir: Path) -> Results:
    """Read a run's results.json; rounds that it leaves out are taken from RUN/rounds.

    Raises:
        ArtifactError: there is no results.json, or it is damaged.
    """
    path = Path(run_dir) / "results.json"
    if not path.is_file():
        raise ArtifactError(
            f"{path} is missing. Give the folder of a finished run; `fedproxy run --resume` finishes one."
        )
    raw = read_json(path)
    if isinstance(raw, dict) and raw.get("rounds") is None:
        raw["rounds"] = [read_json(file) for file in sorted(Path(run_dir).glob("rounds/*/round.json"))]
    return parse(raw, str(path))


def load_events(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of RUN/events.jsonl that are JSON objects; a last line cut short by a crash is left out."""
    path = Path(run_dir) / "events.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [event for line in lines if (event := event_of(line))]
