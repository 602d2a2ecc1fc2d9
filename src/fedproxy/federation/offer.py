"""What the server tells a client once, before any training, and whether the client's own limits allow it."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, replace
from typing import Annotated

from fedproxy.config import Experiment, Federate, Rule, Train, read_table, table, unprivate
from fedproxy.errors import ArtifactError, FederationError, UsageError
from fedproxy.federation.protocol import PROTOCOL, check_protocol, is_name, is_sha256, strict_json, version
from fedproxy.federation.secure.form import Form
from fedproxy.federation.wire import ENCODINGS, PLAIN, encoding

OFFER_CHARACTERS = 16384
"""Of an offer at most so much is read."""
_FEDERATE = (
    *("rounds", "regulariser", "regulariser_strength", "space", "wire", "wire_options", "wire_down"),
    *("validation", "alone", "share_result", "secure"),
)
"""What a client needs of [federate]."""
_SUMMED = ("merge", "merge_options", "max_norm", "privacy")
"""What it needs besides with secure sums."""

_Text = Annotated[
    str, Rule("1 to 200 printable characters", lambda value: 0 < len(value) <= 200 and value.isprintable())
]
_Sha256 = Annotated[str, Rule("64 hex digits", is_sha256)]
_Natural = Annotated[int, Rule("a number from 0 of 63 bits", lambda value: 0 <= value < 1 << 63)]


@table
class Offer:
    """The federation as one client sees it. It names no path and no model: the proxy is known by its hash.

    Attributes:
        run: The experiment's name.
        id: The run's own identity, by which a client tells a resumed run from a new one.
        protocol: Version of the protocol.
        version: Version of fedproxy on the server.
        seed: The experiment's seed.
        start: SHA-256 of the adapter that the run began with (`tensors.digest`), which the client draws itself.
        proxy: SHA-256 of the manifest of the proxy as it is handed out, 64 hex digits.
        train: The [train] table.
        federate: Rounds, regulariser, space, encodings, what is scored, and whether the result is shared, of the
            [federate] table; all else is left at its default.
        max_rows: Rows of this client that are used at most; none for all.
    """

    run: _Text
    id: Annotated[str, Rule("a name", is_name)]  # a client keeps its state in a folder of this name
    protocol: _Natural
    version: _Text
    seed: _Natural
    start: _Sha256
    proxy: _Sha256
    train: Train
    federate: Federate
    max_rows: Annotated[_Natural, Rule("1 or more", lambda value: value > 0)] | None = None

    def encode(self) -> str:
        """The offer as JSON; what is none is left out."""
        values = asdict(self)
        values |= {key: values["federate"][key] for key in (*_FEDERATE, *_SUMMED * self.federate.secure)}
        values["train"] = {key: value for key, value in values["train"].items() if value is not None}
        del values["federate"]
        return json.dumps({key: value for key, value in values.items() if value is not None}, allow_nan=False)

    @property
    def sha256(self) -> str:
        """SHA-256 of all that is asked, 64 hex digits; the run's identity, which asks for nothing, is left out."""
        asked = {key: value for key, value in json.loads(self.encode()).items() if key != "id"}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

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
        problems = [f"{key} is missing" for key in _FEDERATE if key not in values and key != "regulariser_strength"]
        problems += ['has no key "federate"'] * ("federate" in values)  # its keys stand in the offer itself
        asked = {
            key: values.pop(key) for key in (*_FEDERATE, *_SUMMED * (values.get("secure") is True)) if key in values
        }
        train = read_table(Train, values.get("train"), "train", problems)
        federate = read_table(Federate, asked, "federate", problems)
        problems += ["alone: needs validation above 0"] * (federate.alone and not federate.validation)
        problems += unprivate(train, federate)
        offer = read_table(Offer, {**values, "train": train, "federate": federate}, "", problems)
        if not problems:
            try:
                encoding(federate.wire, federate.wire_options)
            except UsageError as error:
                problems.append(f"wire_options: {error}")
        if not problems and federate.secure:
            try:
                Form.of(federate)
            except UsageError as error:
                problems.append(str(error))
        if problems:
            raise ArtifactError("The offer cannot be used:" + "".join(f"\n  - {problem:.300}" for problem in problems))
        return offer


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
    keys = (*_FEDERATE, *_SUMMED * experiment.federate.secure)
    federate = Federate(**{key: getattr(experiment.federate, key) for key in keys})
    if federate.wire not in spoken:
        federate = replace(federate, wire=PLAIN, wire_options={})
    return Offer(
        run=experiment.name,
        id=run_id,
        protocol=PROTOCOL,
        version=version(),
        seed=experiment.seed,
        start=start,
        proxy=proxy,
        train=replace(experiment.train_of(client), report_to=[]),  # the server's own affair
        federate=federate,
        max_rows=next((entry.rows for entry in experiment.client if entry.name == client), None),
    )


@table
class Limits:
    """What a client allows; whoever asks for more, or for so little that its rows could be guessed, is refused.

    Attributes:
        min_rows: Rows that a round trains on, at least.
        min_steps: Optimizer steps of a round that change anything, at least.
        max_rounds: Rounds.
        max_repeats: How often a round may be ordered again.
        max_steps: Optimizer steps in a round.
        max_time: Seconds that the work on an order may take: to train and to score what came of it, or to score the
            round's adapter; looked at after each step and each forward pass.
        max_rank: Rank of the adapter.
        max_length: Tokens of a row.
        max_batch_size: Rows in one forward pass.
        max_adam_epsilon: Adam's epsilon; with a large one an update is nearly a sum of gradients, off which tokens can
            be read (docs/privacy.md).
        max_download: Bytes of the proxy.
        max_epsilon: What private trainings on its rows may cost, over all runs and servers; if given, no other
            training is done.
    """

    min_rows: int = 16
    min_steps: int = 2
    max_rounds: int = 1000
    max_repeats: int = 10
    max_steps: int = 10_000
    max_time: float = 12 * 3600.0
    max_rank: int = 256
    max_length: int = 8192
    max_batch_size: int = 256
    max_adam_epsilon: float = 1e-5
    max_download: int = 500 * 10**9
    max_epsilon: Annotated[float, Rule("above 0", lambda value: value > 0)] | None = None


class DeclinedError(FederationError):
    """A client's own limits forbid what it is asked for."""


def check_offer(offer: Offer, limits: Limits, *, rows: int, steps: int) -> None:
    """Check an offer by a client's limits.

    Args:
        offer: What the server offers.
        limits: What the client allows.
        rows: The client's training rows, `offer.max_rows` at most.
        steps: Optimizer steps that one training by the offer's settings takes with so many rows.

    Raises:
        DeclinedError: they forbid it; each setting is named with its value and the limit.
    """
    train = offer.train
    trained = min(rows, steps * train.batch_size * train.gradient_accumulation_steps)
    changing = steps - (train.warmup_steps > 0)  # a warm-up begins with a learning rate of 0
    asked = {
        "min_rows": ("rows trained on in a round", trained),
        "min_steps": ("optimizer steps a round that change anything", changing),
        "max_rounds": ("[federate] rounds", offer.federate.rounds),
        "max_steps": ("optimizer steps a round", steps * (1 + offer.federate.alone)),
        "max_rank": ("[train] lora_r", train.lora_r),
        "max_length": ("[train] max_length", train.max_length),
        "max_batch_size": ("[train] batch_size", train.batch_size),
        "max_adam_epsilon": ("[train] adam_epsilon", train.adam_epsilon),
    }
    found = []
    for limit, (what, value) in asked.items():
        least, allowed = limit.startswith("min_"), getattr(limits, limit)
        if value < allowed if least else value > allowed:
            found.append(f"{what} = {value}, this client allows {allowed} at {'least' if least else 'most'} ({limit})")
    if limits.max_epsilon is not None and train.privacy is None:
        found.append("training without [train.privacy], this client trains with it alone (max_epsilon)")
    if found:
        raise DeclinedError(f"The offer is declined: {'; '.join(found)}.")
