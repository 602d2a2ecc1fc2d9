"""What the server tells a client once, before any training, and whether the client's own limits allow it."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedproxy.config import Experiment, Federate, Train, read_table
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.federation.protocol import PROTOCOL, check_protocol, is_name, is_sha256, strict_json, version
from fedproxy.federation.wire import ENCODINGS, PLAIN, encoding

OFFER_CHARACTERS = 16384
"""Of an offer at most so much is read."""
_TEXT_CHARACTERS = 200


@dataclass(frozen=True)
class Offer:
    """The federation as one client sees it. It names no path and no model: the proxy is known by its hash.

    Attributes:
        run: The experiment's name.
        id: The run's own identity, by which a client tells a resumed run from a new one.
        protocol: Version of the protocol.
        version: Version of fedproxy on the server.
        seed: The experiment's seed.
        rounds: Number of rounds.
        train: The [train] table.
        regulariser: Name of the regulariser.
        regulariser_strength: Its strength; its own default if none.
        space: What of the adapter is trained.
        wire: Encoding of the client's updates.
        wire_options: Its options.
        wire_down: Encoding of the global adapter in the orders.
        start: SHA-256 of the adapter that the run began with (`tensors.digest`), which the client draws itself.
        max_rows: Rows of this client that are trained on at most; none for all.
        proxy: SHA-256 of the manifest of the proxy as it is handed out, 64 hex digits.
    """

    run: str
    id: str
    protocol: int
    version: str
    seed: int
    rounds: int
    train: Train
    regulariser: str
    regulariser_strength: float | None
    space: str
    wire: str
    wire_options: dict[str, Any]
    wire_down: str
    start: str
    max_rows: int | None
    proxy: str

    @property
    def federate(self) -> Federate:
        """What a client needs of [federate]."""
        return Federate(**{key: getattr(self, key) for key in _FEDERATE})

    def encode(self) -> str:
        """The offer as JSON; what is none is left out."""
        values = asdict(self)
        values["train"] = {key: value for key, value in values["train"].items() if value is not None}
        return json.dumps({key: value for key, value in values.items() if value is not None}, allow_nan=False)

    @staticmethod
    def decode(text: str) -> "Offer":
        """Read an offer.

        Raises:
            ArtifactError: it is no offer, of another protocol, or a setting is unknown, missing or impossible; all
                settings that are wrong are named.
        """
        if len(text) > OFFER_CHARACTERS:
            raise ArtifactError(f"The offer takes {len(text)} characters, {OFFER_CHARACTERS} are read at most.")
        try:
            values = strict_json(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"The offer is no JSON: {error!s:.100}.") from error
        if not isinstance(values, dict):
            raise ArtifactError("The offer is no table.")
        check_protocol(values.get("protocol"), values.get("version"), "The server")
        problems = _problems(values)
        train = read_table(Train, values.get("train", {}), "train", problems)
        read_table(Federate, {key: values[key] for key in _FEDERATE & values.keys()}, "federate", problems)
        if not problems:
            try:
                encoding(values["wire"], values["wire_options"])
            except UsageError as error:
                problems.append(f"wire_options: {error}")
        if problems:
            raise ArtifactError("The offer cannot be used:" + "".join(f"\n  - {problem:.300}" for problem in problems))
        absent = {"regulariser_strength": None, "max_rows": None}
        return Offer(**{**absent, **values, "train": train})


def _text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _TEXT_CHARACTERS and value.isprintable()


def _whole(value: object, least: int) -> bool:
    return type(value) is int and least <= value < 1 << 63


_RULES: dict[str, Any] = {
    "run": _text,
    "id": is_name,  # a client keeps its state in a folder of this name
    "protocol": lambda value: _whole(value, 0),
    "version": _text,
    "seed": lambda value: _whole(value, 0),
    "train": lambda value: isinstance(value, dict),
    "start": is_sha256,
    "max_rows": lambda value: _whole(value, 1),
    "proxy": is_sha256,
}
_FEDERATE = {"rounds", "regulariser", "regulariser_strength", "space", "wire", "wire_options", "wire_down"}
_OPTIONAL = {"regulariser_strength", "max_rows"}


def _problems(values: dict[str, Any]) -> list[str]:
    keys = {*_RULES, *_FEDERATE}
    unknown = [f"{key!r:.60} is not known" for key in sorted(values.keys() - keys)]
    missing = [f"{key} is missing" for key in sorted(keys - values.keys() - _OPTIONAL)]
    wrong = [f"{key} = {values[key]!r:.60}" for key, rule in _RULES.items() if key in values and not rule(values[key])]
    return unknown + missing + wrong


def make_offer(
    experiment: Experiment, client: str, *, run_id: str, proxy: str, start: str, spoken: Collection[str] = ENCODINGS
) -> Offer:
    """What the server of `experiment` offers the client of that name.

    Args:
        experiment: The experiment.
        client: The client; a [[client]] table of that name may limit its rows.
        run_id: The run's identity.
        proxy: SHA-256 of the manifest of the proxy as it is handed out.
        start: SHA-256 of the adapter that the run began with.
        spoken: Encodings that the client agrees to; one that does not agree to [federate] wire sends plain updates.
    """
    asked = {key: getattr(experiment.federate, key) for key in _FEDERATE}
    if asked["wire"] not in spoken:
        asked |= {"wire": PLAIN, "wire_options": {}}
    return Offer(
        run=experiment.name,
        id=run_id,
        protocol=PROTOCOL,
        version=version(),
        seed=experiment.seed,
        train=replace(experiment.train_of(client), report_to=[]),  # the server's own affair
        start=start,
        max_rows=next((table.rows for table in experiment.client if table.name == client), None),
        proxy=proxy,
        **asked,
    )


@dataclass(frozen=True)
class Limits:
    """What a client allows.

    Attributes:
        take_part: Whether it takes part at all.
        max_steps: Optimizer steps in a round; none for any number.
        max_rounds: Rounds; none for any number.
    """

    take_part: bool = True
    max_steps: int | None = None
    max_rounds: int | None = None


def check_offer(offer: Offer, limits: Limits, *, steps: int) -> str | None:
    """Why a client's limits forbid the offer: the setting, its value and the limit; None if they allow it.

    Args:
        offer: What the server offers.
        limits: What the client allows.
        steps: Optimizer steps a round that the offer's settings mean for the client's own rows.
    """
    if not limits.take_part:
        return "this client takes no part"
    if limits.max_steps is not None and steps > limits.max_steps:
        return f"[train] means {steps} optimizer steps a round, this client allows {limits.max_steps} (max_steps)"
    if limits.max_rounds is not None and offer.rounds > limits.max_rounds:
        return f"[federate] rounds = {offer.rounds}, this client allows {limits.max_rounds} (max_rounds)"
    return None
