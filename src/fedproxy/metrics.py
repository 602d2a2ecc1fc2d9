"""Which of a task's metrics counts, whether it can be averaged with accuracies, and what a score can be at all."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

HIGHEST_LOSS = 1000.0
"""Nats per token. Guessing costs the logarithm of the vocabulary's size, about 12: a model beyond this is broken, and
who states more would decide by itself what the mean of several is."""
_OF_A_HUNDRED = ("bleu", "chrf")
"""Metrics of the harness that go from 0 to 100, so that a low one may look like a share."""


def main_metric(names: Iterable[str]) -> str:
    """The name of a task's main metric: "acc" if it has that, else the first one.

    Example:
        >>> main_metric(["f1", "acc_norm"])
        'f1'
    """
    listed = list(names)
    return "acc" if "acc" in listed else listed[0]


def why_left_out(metric: str, value: float, higher_is_better: bool) -> str:
    """Why a metric is in no mean and no verdict: less of it is better, or it is no share of 1. Empty if it is in them.

    Example:
        >>> why_left_out("word_perplexity", 12.0, False), why_left_out("acc", 0.5, True)
        ('less is better of word_perplexity', '')
    """
    if not higher_is_better:
        return f"less is better of {metric}"
    if metric.partition(",")[0] in _OF_A_HUNDRED or not -1 <= value <= 1:
        return f"{metric} is no share of 1"
    return ""


Verdict = Literal["better", "worse", "undecided"]


def verdict(low: float, high: float, by_seed: Iterable[float]) -> Verdict:
    """What a paired difference says: its interval excludes 0, and no seed says the opposite; else it is undecided.

    Args:
        low: Lower end of the interval.
        high: Upper end.
        by_seed: The difference for each seed.

    Example:
        >>> verdict(0.01, 0.03, [0.02, 0.0]), verdict(0.01, 0.03, [0.05, -0.01])
        ('better', 'undecided')
    """
    seeds = list(by_seed)
    if low > 0 and all(value >= 0 for value in seeds):
        return "better"
    if high < 0 and all(value <= 0 for value in seeds):
        return "worse"
    return "undecided"


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
