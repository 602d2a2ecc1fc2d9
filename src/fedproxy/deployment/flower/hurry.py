"""Shorter pauses for Flower: what is announced but not there yet is asked for again after a moment."""

import inspect
from typing import Any

FIRST_PAUSE, LONGEST_PAUSE = 0.03, 0.5
"""Seconds. Flower's own are 1 and 10, and doubled each time; a message is announced before its parts are there."""


def hurry() -> None:
    """Let this process's pulls of Flower's objects pause briefly; a release without these settings is merely slower."""
    from flwr.supercore.inflatable import inflatable_utils

    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        _default(function, initial_backoff=FIRST_PAUSE, backoff_cap=LONGEST_PAUSE)


def _default(function: Any, **values: float) -> None:
    """Give parameters of a function other defaults."""
    parameters = inspect.signature(function).parameters
    known = {name: value for name, value in values.items() if name in parameters}
    if function.__kwdefaults__:
        function.__kwdefaults__.update({name: known[name] for name in known if name in function.__kwdefaults__})
    if function.__defaults__:
        names = [
            name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty
        ]
        function.__defaults__ = tuple(
            known.get(name, old) for name, old in zip(names, function.__defaults__, strict=True)
        )
