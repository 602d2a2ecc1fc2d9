"""What is held against replies: pure functions over one update, a round's norms, and the records of rounds."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedproxy.aggregation.regularise import Carried
from fedproxy.errors import ArtifactError
from fedproxy.federation.messages import Reply
from fedproxy.tensors import CHUNK_ELEMENTS, MappedTensors, Tensors, check_finite, check_layout, chunks

RATIO_NEEDS = 3
"""Replies from which on norms are held against their median: of two, either may be the wrong one; of three, one wrong
norm leaves the median among the honest ones."""


def checked_norm(update: Tensors, adapter: Tensors, client: str) -> float:
    """The Euclidean norm of an update that can be added to the adapter, in float64; a mapped update stays on disk.

    Args:
        update: τ_k.
        adapter: φ_t, whose layout the update must have.
        client: Whose update it is, for the error.

    Raises:
        ArtifactError: the layout differs, a value is NaN or infinite, or a sum φ_t + τ_k or the norm overflows.
    """
    check_layout(adapter, update, client)
    check_finite(update, client)
    total = 0.0
    for spans in chunks(update, CHUNK_ELEMENTS):
        for span in spans:
            values = span.of(update)
            if not (span.of(adapter) + values.to(adapter[span.name].device)).isfinite().all():
                raise ArtifactError(f"{client}: {span.name} takes the adapter beyond {values.dtype}.")
            total += float(values.double().square().sum())
    if isinstance(update, MappedTensors):
        update.release()
    if not math.isfinite(total):
        raise ArtifactError(f"{client}: the update's squared norm exceeds float64.")
    return math.sqrt(total)


def check_training(reply: Reply, carried: Carried | None) -> None:
    """Check what a reply says of its training, and that it brings the numbers that the regulariser carries on with.

    Raises:
        ArtifactError: nothing was trained, or a number is missing, unknown or impossible.
    """
    if reply.rows < 1 or reply.steps < 1 or not math.isfinite(reply.loss or 0.0):
        raise ArtifactError(f"rows {reply.rows}, steps {reply.steps}, loss {reply.loss}: nothing was trained")
    if (reply.loss is None) == (reply.epsilon is None):  # a private training tells its cost in place of its loss
        raise ArtifactError(f"loss {reply.loss}, epsilon {reply.epsilon}: one of them is expected")
    if set(reply.numbers) != set(carried.numbers if carried else ()):
        said = ", ".join(sorted(reply.numbers)) or "none"
        raise ArtifactError(f"it sent these numbers of its training: {said}")
    if carried:
        carried.check(reply)


def outliers(norms: Mapping[str, float], ratio: float) -> dict[str, str]:
    """The clients whose norm exceeds `ratio` times the round's median, each with the reason.

    The median is the lower one of an even number, so that a half of giants does not move it. Fewer than `RATIO_NEEDS`
    norms, or a median of zero, say nothing. Adam's steps are bounded, so an honest norm grows about as the number of
    optimizer steps at most: a ratio of 10 spares clients with some ten times the median's rows.
    """
    if len(norms) < RATIO_NEEDS:
        return {}
    median = sorted(norms.values())[(len(norms) - 1) // 2]
    if median == 0:
        return {}
    return {
        name: f"its norm {norm:.4g} is {norm / median:.4g} times the round's median {median:.4g}; "
        f"max_norm_ratio is {ratio:g}"
        for name, norm in norms.items()
        if norm > ratio * median
    }


FAILURES_IN_A_ROW = 10
"""A client that failed so often, one time after the other, is not asked again."""


def failing(record: Mapping[str, Any]) -> set[str]:
    """The clients that were asked in a round, or in a failed attempt at one, and gave no valid reply."""
    faults = [*record.get("refused", ()), *record.get("quarantined", ())]
    return {str(fault["client"]) for fault in faults} | set(record.get("dropouts", ()))


def failures(records: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """How often each client failed since its last reply that counted, over rounds and their failed attempts."""
    found: Counter[str] = Counter()
    for part in (part for record in records for part in (*record.get("attempts", ()), record)):
        found.update(failing(part))
        for name in part.get("clients", ()):
            del found[name]
    return found


def strikes(records: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """How many invalid replies and scores each client sent, over the records of rounds and of their failed attempts."""
    rounds = [part for record in records for part in (record, *record.get("attempts", ()))]
    parts = [
        part for one in rounds for part in (one.get("quarantined", ()), one.get("validation", {}).get("faults", ()))
    ]
    faults = [fault for part in parts for fault in part]
    return Counter(fault["client"] for fault in faults if fault.get("kind") == "invalid")
