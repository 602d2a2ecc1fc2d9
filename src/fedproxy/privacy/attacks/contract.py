"""What an attack is: a row that says who sees what, and a function of a finished run that ends in figures."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedproxy.privacy.attacks.subject import Subject
from fedproxy.privacy.measures.membership import FALSE_ALARMS, Estimate

Options = TypeVar("Options")
Tell = Callable[[float, str], None]
"""Told the fraction that is done, and what is being done."""


@dataclass(frozen=True)
class Figure:
    """A number that an attack reached.

    Attributes:
        where: What was attacked, and under what settings.
        measure: What the number is.
        value: The number.
        low: Lower end of its interval; none if there is no interval.
        high: Upper end.
        chance: What an attacker reaches who learns nothing; none if there is no such number.
        of: How many of what it rests on.
    """

    where: str
    measure: str
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    of: str = ""


@dataclass
class Found:
    """What came of an attack.

    Attributes:
        figures: Its figures, in the order in which they are shown.
        missing: What was not measured, and why; a sentence each.
        notes: What has to be known of the figures; a sentence each.
    """

    figures: list[Figure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Attack(Generic[Options]):
    """An attack.

    Attributes:
        name: Its name on the command line and in attacks.json.
        title: What it tries to find out, as a heading.
        paper: Where it is from.
        sees: Who the attacker is, and what it has.
        options: Frozen dataclass of its options with defaults (float or Literal fields); it checks their values.
        run: A finished run, the options and what is told of the progress → what came of it.
    """

    name: str
    title: str
    paper: str
    sees: str
    options: type[Options]
    run: Callable[[Subject, Options, Tell], Found]


def membership_figures(where: str, measured: dict[str, Estimate], of: str) -> Iterator[Figure]:
    """The figures of an attack that tells members from others.

    Args:
        where: As of `Figure`.
        measured: As of `measures.membership.estimates`.
        of: As of `Figure`.
    """
    for name, measure, chance in (
        ("auc", "AUC", 0.5),
        ("hits", f"TPR at {FALSE_ALARMS:.0%} FPR", FALSE_ALARMS),
    ):
        found = measured[name]
        yield Figure(where, measure, found.value, found.low, found.high, chance, of)
