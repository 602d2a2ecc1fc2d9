"""Federated evaluation: what clients say of a round's adapter, what follows from it, and which round is the best.

In round t a client trains from φ_t and scores, with its reply, its own update, and in its first round the untuned
proxy. The replies make φ_{t+1}, the round's adapter. It goes out at once to those whose reply brought scores, and they
score it; only then is the round complete and stored. So a round's record holds the scores of that round's adapter, the
last round is like any other, and a run that is killed in between does the whole round again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedproxy.errors import ArtifactError
from fedproxy.federation.messages import Reply, Score
from fedproxy.metrics import HIGHEST_LOSS

COMPARED = ("untuned", "alone")
"""What the round's adapter is compared with."""
MODELS = ("untuned", "own", "alone", "global")
"""What a client scores: the proxy without an adapter, with its own update of the round, with what it trained without
the others, and with the round's adapter."""


def check_scores(reply: Reply, *, wanted: bool, untuned: bool, alone: bool) -> None:
    """Check the scores of a reply, which may have none.

    Args:
        reply: The reply.
        wanted: Whether scores were offered at all.
        untuned: Whether one of the untuned proxy was ordered.
        alone: Whether clients also train alone; one that lost what it trained alone says nothing of it.

    Raises:
        ArtifactError: they are not those that were ordered, or impossible.
    """
    found, needed = set(reply.validation), {"own", *(["untuned"] if untuned else [])}
    if found and not (wanted and needed <= found <= needed | ({"alone"} if alone else set())):
        raise ArtifactError(f"it sent these scores: {', '.join(sorted(found))}")
    for name, score in reply.validation.items():
        check_score(name, score, reply.rows)
    if len({score.rows for score in reply.validation.values()}) > 1:
        raise ArtifactError("its scores are of different numbers of rows")


def check_score(name: str, score: Score, most: int) -> None:
    """Check that a score can be one, of at most so many rows.

    Raises:
        ArtifactError: it cannot.
    """
    accuracy = 0.0 if score.accuracy is None else score.accuracy
    if not (0 <= score.loss <= HIGHEST_LOSS and 0 <= accuracy <= 1 and 0 < score.rows <= most):
        raise ArtifactError(
            f"its score {name} cannot be: loss {score.loss:.4g} (at most {HIGHEST_LOSS:g}), accuracy {accuracy:.4g}, "
            f"{score.rows} rows (at most the {most} that it trains on)"
        )


def as_scores(found: Mapping[str, Any]) -> dict[str, Score]:
    """The scores that a record holds of a client."""
    return {name: Score(**score) for name, score in found.items()}


def summary(clients: Mapping[str, Mapping[str, Score]]) -> dict[str, Any]:
    """What the clients of a round say together.

    Args:
        clients: Name → what it scored → its score.

    Returns:
        Of each of `MODELS` that anyone scored, what `together` says. And `gain`: of each of `COMPARED`, how much lower
        the loss and higher the accuracy of the round's adapter is, a row as much as any other, over the clients that
        scored both.
    """
    found: dict[str, Any] = {}
    for model in MODELS:
        scores = {name: one[model] for name, one in sorted(clients.items()) if model in one}
        if not scores:
            continue
        found[model] = together(scores)
    pairs = {
        model: [(one[model], one["global"]) for _, one in sorted(clients.items()) if {model, "global"} <= one.keys()]
        for model in COMPARED
    }
    found["gain"] = {model: _gain(both) for model, both in pairs.items() if both}
    return found


def together(scores: Mapping[str, Score]) -> dict[str, Any]:
    """What the scores of one model say together.

    Args:
        scores: Client → score, at least one.

    Returns:
        `clients`, `rows`, `loss` and `accuracy`, each `by_rows` (a row counts as much as any other) and `by_clients` (a
        client does), and the `worst` client, of highest loss.
    """
    worst = max(sorted(scores), key=lambda name: scores[name].loss)
    return {
        "clients": len(scores),
        "rows": sum(score.rows for score in scores.values()),
        **_means(list(scores.values())),
        "worst": {"client": worst, **asdict(scores[worst])},
    }


def _means(scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    labelled = [score for score in scores if score.accuracy is not None]
    found = {"loss": [(score.loss, score.rows) for score in scores]}
    if labelled:
        found["accuracy"] = [(score.accuracy or 0.0, score.rows) for score in labelled]
    return {
        key: {"by_rows": _mean(values), "by_clients": _mean([(value, 1) for value, _ in values])}
        for key, values in found.items()
    }


def _gain(both: Sequence[tuple[Score, Score]]) -> dict[str, float]:
    found = {"loss": _mean([(before.loss - after.loss, after.rows) for before, after in both])}
    labelled = [(b.accuracy, a.accuracy, a.rows) for b, a in both if b.accuracy is not None and a.accuracy is not None]
    if labelled:
        found["accuracy"] = _mean([(after - before, rows) for before, after, rows in labelled])
    return found


def _mean(values: Sequence[tuple[float, int]]) -> float:
    """The mean of values with weights."""
    return math.fsum(value * weight for value, weight in values) / sum(weight for _, weight in values)


@dataclass(frozen=True)
class Standing:
    """What the rounds so far say.

    Attributes:
        best: The round whose adapter lowers the loss most below the untuned proxy's (`gain`), the first of equals; none
            if nobody scored any. Since clients are compared with themselves, who is asked in a round matters little.
        stop: Whether as many scored rounds as [federate] patience_rounds came after it.
    """

    best: int | None
    stop: bool

    @staticmethod
    def of(records: Sequence[Mapping[str, Any]], patience: int) -> "Standing":
        """The standing after these rounds; of their records, and so the same after a resume."""
        gains = {int(record["round"]): gain for record in records if (gain := _gained(record)) is not None}
        if not gains:
            return Standing(None, False)
        best = max(gains, key=lambda number: (gains[number], -number))
        return Standing(best, 0 < patience <= sum(number > best for number in gains))


def _gained(record: Mapping[str, Any]) -> float | None:
    gain = record.get("validation", {}).get("gain", {}).get("untuned")
    return None if gain is None else float(gain["loss"])
