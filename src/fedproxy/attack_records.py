"""What is written of attacks on a run: attacks.json, as types."""

from pathlib import Path
from typing import Any

from pydantic import Field

from fedproxy.artifacts import inside
from fedproxy.typed_json import Given, Number, Record, Whole, read_record

ATTACKS_FILE = "attacks.json"
"""RUN/attacks.json: what attacks on the run found."""
FROM_PROXY, OWN_PROXY, AS_IT_IS, API_ALONE = "llm-from-proxy", "the run's proxy", "as it is", "only the API, no proxy"
"""An attack by its name, and how the places of its figures begin or end: of which proxy, by which attacker."""
WAY, ACCURACY_GAP = "share of the way to the LLM", "share of the accuracy gap to the LLM"
"""What that attack measures: by the loss, and by the tasks that the run scores its models on."""
_MOST_FIGURES = 4_000
"""No attack comes near them, and a page has no room for more."""


class Figure(Record):
    """A number that an attack reached, as of `privacy.attacks.contract.Figure`."""

    where: str
    measure: str
    value: Number
    low: Number | None = None
    high: Number | None = None
    chance: Number | None = None
    of: str = ""


class Attacked(Record):
    """What came of one attack on a run.

    Attributes:
        sees: Who the attacker is, and what it has.
        missing: What was not measured, and why.
        notes: What has to be known of the figures.
    """

    title: str = ""
    paper: str = ""
    sees: str = ""
    options: dict[str, Any] = {}
    figures: list[Figure] = Field(default=[], max_length=_MOST_FIGURES)
    missing: list[str] = []
    notes: list[str] = []
    seconds: Number | None = None
    seed: Whole | None = None
    environment: dict[str, Any] = {}


class Attacks(Record):
    """A run's attacks.json: attack → what came of it."""

    attacks: Given[Attacked] = {}


def read_attacks(run: Path) -> Attacks:
    """Read a run's attacks.json; of a run that was not attacked nothing.

    Raises:
        ArtifactError: it is damaged, or a link leads out of the run.
    """
    path = inside(Path(run), ATTACKS_FILE)
    return read_record(path, Attacks) if path.is_file() else Attacks()
