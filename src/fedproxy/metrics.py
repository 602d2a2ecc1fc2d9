"""Which of a task's metrics counts."""

from collections.abc import Iterable


def main_metric(names: Iterable[str]) -> str:
    """The name of a task's main metric: "acc" if it has that, else the first one.

    Example:
        >>> main_metric(["f1", "acc_norm"])
        'f1'
    """
    listed = list(names)
    return "acc" if "acc" in listed else listed[0]
