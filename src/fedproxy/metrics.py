"""Which of a task's metrics counts, and whether it can be averaged with accuracies."""

from collections.abc import Iterable

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
