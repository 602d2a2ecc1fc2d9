"""What is written of runs and comparisons: results.json, round.json, an evaluation and compare.json, as types."""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationInfo
from pydantic import field_validator as field
from pydantic import model_validator as whole

from fedproxy.artifacts import inside
from fedproxy.errors import ArtifactError
from fedproxy.metrics import gap_closed, main_metric, verdict
from fedproxy.typed_json import (
    LARGEST,
    Block,
    Cosine,
    Given,
    Name,
    Number,
    Record,
    Settings,
    Share,
    Whole,
    given,
    read_record,
)

MODELS = {
    "llm": "LLM",
    "proxy": "Proxy",
    "proxy_tuned": "Tuned proxy",
    "fused": "Fused LLM",
    "proxy_tuning": "LLM with decode-time proxy tuning",
    "centralized": "Centralized",
}
"""The models that are evaluated, as people call them."""
_MOST_CELLS, _MOST_ROWS, _MOST_DIFFERENCES, _MOST_BLOCKS = 10_000, 400, 4_000, 10_000
"""No comparison comes near them, and a page has no room for more."""


def _known(value: Any) -> Any:
    return {model: value[model] for model in MODELS if model in value} if isinstance(value, dict) else value


class Score(Record):
    """What a model scored on one task: its main metric, and the number of rows; in a file a number, or all metrics."""

    value: Number
    n: Whole | None = None

    @whole(mode="before")
    @classmethod
    def _main(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return {"value": value}
        metrics = [key for key, entry in value.items() if key != "n" and _is_number(entry)]
        if not metrics:
            raise ValueError("expected a metric")
        return {"value": value[main_metric(metrics)], "n": value.get("n")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


class Evaluation(Record):
    """What one model scored.

    Attributes:
        scores: Of every task.
        left_out: Task → why its score is in no mean: less of it is better, or it is no share of 1.
        average: Mean over the others.
    """

    scores: Given[Score] = Field(default={}, alias="tasks")
    left_out: Given[str] = {}
    average: Number | None = Field(default=None, validate_default=True)

    @field("average")
    @classmethod
    def _mean(cls, value: float | None, info: ValidationInfo) -> float | None:
        left_out = info.data.get("left_out", {})
        found = [score.value for task, score in info.data.get("scores", {}).items() if not left_out.get(task)]
        return sum(found) / len(found) if value is None and found else value

    @cached_property
    def tasks(self) -> dict[str, float]:
        """Task → score, of those in the mean."""
        return {task: score.value for task, score in self.scores.items() if not self.left_out.get(task)}


class OnHeldBack(Record):
    """What one client states of a model on the rows that it keeps back; of the worst client, its name as well."""

    client: str = ""
    loss: Number | None = None
    accuracy: Share | None = None
    rows: Whole | None = None


class Client(Record):
    """One client in one round, as it stated it; `validation` has the models "untuned", "own", "alone", "global"."""

    rows: Whole | None = None
    steps: Whole | None = None
    loss: Number | None = None
    seconds: Number | None = None
    tokens_per_second: Number | None = None
    peak_memory: Whole | None = Field(default=None, alias="peak_memory_bytes")
    wire: str = ""
    bytes_up: Whole | None = None
    bytes_down: Whole | None = None
    epsilon: Number | None = None
    validation: Given[OnHeldBack] = {}


class Means(Record):
    """A mean to which a row contributes as much as any other, and one to which a client does."""

    by_rows: Number | None = None
    by_clients: Number | None = None


class Together(Record):
    """What all clients of a round state of a model."""

    clients: Whole | None = None
    rows: Whole | None = None
    loss: Means = Means()
    accuracy: Means = Means()
    worst: OnHeldBack = OnHeldBack()


class Quarantined(Record):
    """A client whose update, or whose score, was left out."""

    client: str = "?"
    reason: str = "no reason recorded"


class Validation(Record):
    """What the clients of a round state; `gain` over the "untuned" proxy and training "alone": of loss, of accuracy."""

    untuned: Together | None = None
    own: Together | None = None
    alone: Together | None = None
    merged: Together | None = Field(default=None, alias="global")
    gain: Given[Given[Number]] = {}
    best_round: Whole | None = None
    stop: bool = False
    dropouts: list[str] = []
    faults: list[Quarantined] = []


class Prompt(Record):
    """What stands before a row's answer, as training renders it, and the answer.

    Attributes:
        text: The prompt.
        special: Whether the tokenizer adds tokens of its own.
        answer: The row's own.
    """

    text: str
    special: bool = True
    answer: str = ""


class OfLLM(Record):
    """What the LLM and the fused LLM reach on the rows on which clients scored the adapter that is kept."""

    llm: Together | None = None
    fused: Together | None = None


class Analysis(Record):
    """How the merged updates of a round relate; a rule that weighs nobody has no weights.

    Attributes:
        names: The merged clients; the lists are in their order.
        similarity: Cosine of each two.
        conflict_histogram: Number of coordinates with conflict 0, 1/K, …, 1.
    """

    names: list[str] = []
    similarity: list[list[Cosine]] = []
    heterogeneity: list[Number] = []
    weights: list[Number] = []
    retention: list[Number] = []
    conflict_histogram: list[Whole] = []
    conflict_mean: Number | None = None

    @field("similarity")
    @classmethod
    def _square(cls, value: list[list[float]], info: ValidationInfo) -> list[list[float]]:
        count = len(info.data.get("names", value))
        if value and [len(row) for row in value] != [count] * count:
            raise ValueError(f"expected {count} rows of {count} numbers")
        return value

    def of(self, name: str) -> list[float | None]:
        """A client's heterogeneity, weight and retention; None where there is none."""
        return [column.get(name) for column in self._columns]

    @cached_property
    def _columns(self) -> list[dict[str, float]]:
        columns = (self.heterogeneity, self.weights, self.retention)
        return [dict(zip(self.names, column, strict=False)) for column in columns]


class Round(Record):
    """One round of the federation, as in round.json; `conflict` is the mean of each LLM block, if it was kept."""

    number: Whole = Field(alias="round")
    clients: Given[Client] = {}
    quarantined: list[Quarantined] = []
    analysis: Analysis = Analysis()
    conflict: Annotated[dict[Block, Share], BeforeValidator(given)] = {}
    seconds: Number | None = None
    validation: Validation = Validation()

    @property
    def unscored(self) -> dict[str, str]:
        """The clients whose score of the round's adapter is missing, and why, in a round that anyone was to score."""
        told = self.validation
        if not told.faults and not told.dropouts and told.merged is None:
            return {}
        found = {name: "it gives no scores" for name, client in self.clients.items() if not client.validation}
        found |= dict.fromkeys(told.dropouts, "it did not answer in time")
        return found | {fault.client: fault.reason for fault in told.faults}

    @property
    def loss(self) -> float | None:
        """Mean over the clients, each of which counts the same."""
        found = [client.loss for client in self.clients.values() if client.loss is not None]
        return sum(found) / len(found) if found else None


class LLM(Record):
    """The LLM; its path and identity are empty if they were not recorded."""

    path: str = ""
    sha256: str = ""
    blocks: Whole | None = None
    parameters: Whole | None = None


class Perplexity(Record):
    """Of the LLM and of the proxy, on the same public text."""

    llm: Number
    proxy: Number


class Proxy(Record):
    """The proxy: the LLM block of each of its blocks, and the score of every LLM block."""

    parameters: Whole | None = None
    perplexity: Perplexity | None = None
    layer_map: list[Whole] = Field(default=[], max_length=_MOST_BLOCKS)
    scores: list[Number] = Field(default=[], max_length=_MOST_BLOCKS)


class Cost(Record):
    """What a run took: seconds by stage, and bytes of all clients and rounds; the proxy is sent once to each client."""

    seconds: Given[Number] = {}
    bytes_up: Whole | None = None
    bytes_down: Whole | None = None
    proxy_bytes: Whole | None = None
    peak_memory: Whole | None = Field(default=None, alias="peak_memory_bytes")


class Results(Record):
    """A run's results.json; `evaluation` holds those of `MODELS` that were evaluated, in that order.

    `kept_round` is the round whose adapter is the result.
    """

    name: str = "run"
    seed: Whole | None = None
    llm: LLM = LLM()
    proxy: Proxy = Proxy()
    evaluation: Annotated[Given[Evaluation], BeforeValidator(_known)] = {}
    validation: OfLLM = OfLLM()
    prompt: Prompt | None = None
    rounds: list[Round] = []
    kept_round: Whole | None = None
    cost: Cost = Cost()
    environment: dict[str, Any] = {}
    experiment: dict[str, Any] = {}

    @cached_property
    def tasks(self) -> list[str]:
        """Every task that a model was scored on, in the order of the first model that has it."""
        return list(dict.fromkeys(task for scored in self.evaluation.values() for task in scored.tasks))

    @property
    def left_out(self) -> dict[str, str]:
        """Task → why some model's value of it is in no mean."""
        found = (scored for scored in self.evaluation.values())
        return {task: why for each in found for task, why in each.left_out.items() if task in each.scores and why}

    def rows(self, task: str) -> int | None:
        """Number of rows of a task."""
        found = (scored.scores[task].n for scored in self.evaluation.values() if task in scored.scores)
        return next((rows for rows in found if rows is not None), None)

    @property
    def clients(self) -> list[str]:
        """Every client that trained, in the order of the rounds."""
        return list(dict.fromkeys(name for round_ in self.rounds for name in round_.clients))

    @property
    def exposed(self) -> float | None:
        """Parameters of the proxy, which every client has, as a share of the LLM's."""
        if not self.llm.parameters or self.proxy.parameters is None:
            return None
        return self.proxy.parameters / self.llm.parameters

    @property
    def kept(self) -> Round | None:
        """The round whose adapter is the result; the last one where it is not said."""
        found = (each for each in self.rounds if each.number == self.kept_round)
        return next(found, self.rounds[-1] if self.rounds else None)

    def setting(self, table: str, key: str) -> Any:
        """A value of the experiment, or None."""
        values = self.experiment.get(table)
        return values.get(key) if isinstance(values, dict) else None

    @property
    def gap_closed(self) -> float | None:
        """See `metrics.gap_closed`."""
        return gap_closed({model: dict(scored) for model, scored in self.evaluation.items()})

    def average(self, model: str) -> float | None:
        """A model's mean score, or None if it was not evaluated."""
        return self.evaluation[model].average if model in self.evaluation else None


class Accuracy(Evaluation):
    """What a cell's model scored; there is always a mean."""

    average: Number


class Parties(Record):
    """A cost of the server, and of the clients."""

    clients: Number | None = None
    server: Number | None = None


class Worst(Record):
    """The client's task with the lowest accuracy; empty if it was not recorded."""

    task: str = ""
    accuracy: Number | None = None


class Cell(Record):
    """One method with one seed at one ratio: a share `remove` of the LLM's blocks is removed, if it takes a proxy.

    `trainings` are the names of those it rests on; cells may share them. Without a federation, and in files of earlier
    versions, there are no rounds.
    """

    method: Name
    seed: Whole
    remove: Number
    accuracy: Accuracy
    proxy_tuned: Evaluation = Evaluation()
    worst: Worst = Worst()
    gap_closed: Number | None = None
    exposed: Number | None = None
    bytes_up: Number | None = None
    bytes_down: Number | None = None
    proxy_bytes: Number | None = None
    flops: Parties = Parties()
    peak_memory_bytes: Parties = Parties()
    seconds: Given[Number] = {}
    trainings: tuple[str, ...] = ()
    proxy: Proxy = Proxy()
    rounds: list[Round] = []


class Difference(Record):
    """How much more accurate `method` is than `against`, as a share of 1, with its interval.

    Attributes:
        level: Share of the bootstrap's samples within the interval from `low` to `high`.
        by_seed: The difference for each seed.
        verdict: As of `metrics.verdict`, whatever the file says: earlier ones did not ask whether the seeds agree.
        tasks: The tasks that it is of.
    """

    method: Name
    against: Name
    remove: Number
    mean: Number
    low: Number
    high: Number
    level: Number = 0.95
    by_seed: list[Number] = []
    verdict: Name
    tasks: list[str] = []

    @field("verdict")
    @classmethod
    def _of_the_interval(cls, value: str, info: ValidationInfo) -> str:
        low, high = info.data.get("low", 0.0), info.data.get("high", 0.0)
        found = verdict(low, high, info.data.get("by_seed", []))
        if value not in (found, expected := verdict(low, high, [])):
            raise ValueError(f"of an interval from {low:g} to {high:g} it is {expected!r}")
        return found

    @property
    def turned(self) -> Self:
        """The same, seen from the other method."""
        verdict = {"better": "worse", "worse": "better"}.get(self.verdict, self.verdict)
        ends = {"mean": 0.0 - self.mean, "low": 0.0 - self.high, "high": 0.0 - self.low}
        others = {"method": self.against, "against": self.method, "by_seed": [0.0 - value for value in self.by_seed]}
        return self.model_copy(update={**ends, **others, "verdict": verdict})


class Comparison(Record):
    """A comparison's compare.json.

    Attributes:
        methods: Method → its choice on each axis, and "paper".
        flops: How operations were counted.
        commit: Of the repository; empty if there was none.
    """

    name: str = "comparison"
    compare: dict[str, Any] = {}
    experiment: Settings = {}
    environment: dict[str, Any] = {}
    methods: Given[Given[str]] = {}
    flops: str = ""
    commit: str = ""
    cells: list[Cell] = Field(min_length=1, max_length=_MOST_CELLS)
    differences: list[Difference] = Field(default=[], max_length=_MOST_DIFFERENCES)

    @field("cells")
    @classmethod
    def _once(cls, value: list[Cell]) -> list[Cell]:
        seen = set()
        for key in ((cell.method, cell.seed, cell.remove) for cell in value):
            if key in seen:
                raise ValueError(f"two cells are of {key[0]:.60}, seed {key[1]}, remove {key[2]:g}")
            seen.add(key)
        if (rows := len({(method, remove) for method, _, remove in seen})) > _MOST_ROWS:
            raise ValueError(f"{rows} methods and ratios, at most {_MOST_ROWS} have room on a page")
        return value


def read_run(run: Path) -> Results:
    """Read a run's results.json; rounds that it leaves out are taken from RUN/rounds.

    Raises:
        ArtifactError: there is no results.json, it or a round is damaged, or a link leads out of the run.
    """
    run = Path(run)
    path = inside(run, "results.json")
    if not path.is_file():
        raise ArtifactError(
            f"{path} is missing. Give the folder of a finished run; `fedproxy run --resume` finishes one."
        )
    found = read_record(path, Results)
    if "rounds" in found.model_fields_set:
        return found
    return found.model_copy(update={"rounds": read_rounds(run)})


def read_rounds(run: Path) -> list[Round]:
    """Read the round.json of every complete round in RUN/rounds.

    Raises:
        ArtifactError: one is damaged, or a link leads out of the run.
    """
    files = (inside(run, str(file.relative_to(run))) for file in sorted(run.glob("rounds/*/round.json")))
    return [read_record(file, Round) for file in files]
