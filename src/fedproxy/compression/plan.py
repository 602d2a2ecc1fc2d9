"""What compressing would give: scores of the blocks, and what each share removed would cost; nothing is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fedproxy.compression.compress import enter, read_text
from fedproxy.compression.exposure import exposure
from fedproxy.compression.scores import SCORES, Importance
from fedproxy.compression.select import between, removed_count, rounded_down
from fedproxy.config import Train
from fedproxy.models.checkpoints import load_tokenizer
from fedproxy.models.placement import check_placement, open_stream
from fedproxy.models.source import Source, open_source
from fedproxy.models.training_memory import bytes_to_train

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Option:
    """A proxy that could be made.

    Attributes:
        remove: Share of the blocks to remove.
        keep: The blocks that stay, rising.
        parameters: Number of parameters.
        bytes: Size of its tensors on disk, as stored.
        cpu_memory: Bytes that a client needs to train it on a CPU in float32, beside the program itself.
        gpu_memory: Bytes that a client needs on a GPU in bfloat16.
    """

    remove: float
    keep: list[int]
    parameters: int
    bytes: int
    cpu_memory: int
    gpu_memory: int


@dataclass(frozen=True)
class Plan:
    """What a dry run found.

    Attributes:
        score: Name in `SCORES`.
        scores: Score of every block when `remove` is asked for.
        remove: The share asked for.
        options: A proxy for each ratio, rising; one of them is `remove`.
        train: How clients are taken to train.
        parameters: Number of parameters of the LLM's decoder.
        bytes: Size of its tensors on disk.
    """

    score: str
    scores: list[float]
    remove: float
    options: list[Option]
    train: Train
    parameters: int
    bytes: int

    @property
    def chosen(self) -> Option:
        """The proxy asked for."""
        return next(option for option in self.options if option.remove == self.remove)


def plan(
    llm: str | Path,
    *,
    remove: float = 0.5,
    calibration: str | Path | None = None,
    score: str = "block-influence",
    keep_first: int = 0,
    keep_last: int = 0,
    samples: int = 512,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    placement: str = "auto",
    ratios: Sequence[float] = RATIOS,
    train: Train | None = None,
    trust_remote_code: bool = False,
    on_progress: Callable[[float, str], None] | None = None,
) -> Plan:
    """Score the blocks of an LLM and say what would be kept; nothing is written.

    Arguments are as of `compress`. The `ratios` are other shares to look at, if they remove a block and the blocks that
    are kept in any case allow them; `train` is how clients will train, for the memory they need, by default [train]'s.

    Raises:
        ArtifactError: the LLM or the calibration text cannot be used.
        UsageError: a setting is impossible.
    """
    report = on_progress or (lambda fraction, text: None)
    check_placement(placement)
    shares = sorted({*ratios, remove})
    text = read_text(calibration, score, samples, seed)
    report(0.0, "looking at the LLM")
    source = open_source(llm, trust_remote_code=trust_remote_code)
    among = between(source.count, keep_first, keep_last, removed_count(source.count, remove))
    counts = {share: rounded_down(source.count, share) for share in shares}
    counts = {share: count for share, count in counts.items() if count <= len(among) and (count or not share)}
    tokenizer = load_tokenizer(source.path, trust_remote_code=trust_remote_code)
    stream = open_stream(source, placement)
    needed = text if SCORES[score].reads_text else None
    passages = enter(stream, tokenizer, needed, max_length=max_length, batch_size=batch_size)

    def measure(most: int) -> Importance:
        return SCORES[score].score(
            stream,
            passages,
            most=most,
            among=among,
            seed=seed,
            progress=lambda done: report(0.02 + 0.95 * done, "scoring the blocks"),
        )

    importance = measure(max(counts.values()))
    asked = importance if _nested(importance.removals) else measure(counts[remove])
    train = train or Train()
    options = [_option(source, share, importance.removals[counts[share]], train) for share in counts]
    whole = exposure(source, range(source.count))
    report(1.0, "planned")
    return Plan(score, asked.scores, remove, options, train, whole["parameters"], whole["bytes"])


def _nested(removals: Sequence[Sequence[int]]) -> bool:
    """Whether the blocks go in one order, so that scores do not depend on how many go."""
    return all(set(few) <= set(more) for few, more in pairwise(removals))


def _option(source: Source, share: float, removed: Sequence[int], train: Train) -> Option:
    keep = sorted(set(range(source.count)).difference(removed))
    sheet = exposure(source, keep)
    needed = bytes_to_train(source.decoder, keep, train, sheet["parameters"])
    return Option(share, keep, sheet["parameters"], sheet["bytes"], needed["cpu"], needed["gpu"])
