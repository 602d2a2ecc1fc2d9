"""What holds a run's result back, told from its own figures, and what to try next.

Each rule compares two figures and has a threshold above what chance does. A run whose fused LLM closes almost all of
the gap has no hindrance, whatever its figures are. What a run did not measure is not guessed: without [evaluate] or
validation rows fewer rules can speak.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fedproxy.records import Results, Round, Together
from fedproxy.reporting.units import count, decimals, percent, points

CLOSED = 0.95
"""A share of the gap; where it is closed, nothing holds the result back."""
DAMAGED = 5.0
"""The proxy's perplexity as a multiple of the LLM's. That of SmolLM2 is 15 without half of its blocks, which closes a
sixth of the gap in few steps, and 3 without a quarter, where tuning moves the fused LLM far (experiments/smollm2)."""
LEAST = 0.03
"""A difference of two mean accuracies that counts, if it is two standard errors as well."""
LOST = 0.25
"""Share of what clients gain by training that the merge may lose."""
MORE_STEPS = "Let clients take more steps: a smaller [train] batch_size, or more rounds ([federate] rounds)"
"""What helps where a proxy is damaged: on SmolLM2 batches of two rows in place of eight did, of the same
rows; a hundred steps of healing did not. A refit helped with three quarters removed (experiments/smollm2)."""
CHANGED, VISIBLE = 0.05, 0.01
"""A change of a loss from one round to the next that counts, relative to the loss, and in nats; it must be both."""


@dataclass(frozen=True)
class Hindrance:
    """A reason why a result is no better.

    Attributes:
        kind: One of a few words, the same in every run.
        found: What the figures say.
        advice: What to try next.
    """

    kind: str
    found: str
    advice: str


def hindrances(results: Results) -> list[Hindrance]:
    """What holds a run's result back, in the order of its stages.

    Args:
        results: A complete run.
    """
    if (results.gap_closed or 0.0) >= CLOSED:
        return []
    rules = (_not_learned, _damaged, _interference, _rising, _falling, _plug_in)
    return [found for rule in rules for found in rule(results)]


def _differs(results: Results, difference: float, *tasks: str) -> bool | None:
    """Whether a difference of two mean accuracies over these tasks is more than chance; None if that is not known."""
    rows = [results.rows(task) or 0 for task in tasks]
    return None if min(rows, default=0) < 1 else difference > _chance(rows)


def _chance(rows: Sequence[int]) -> float:
    """What chance may make of the difference of two mean accuracies over tasks of so many rows, at least `LEAST`."""
    return max(LEAST, 2 * math.sqrt(2 * sum(0.25 / number for number in rows)) / len(rows))


def _below(results: Results, model: Together | None, other: Together | None) -> bool:
    """Whether a model does worse than another one on the same rows that clients keep back.

    Either its loss is higher by so much that it counts, or its accuracy is lower by more than chance may give.
    """
    if model is None or other is None or model.rows != other.rows:
        return False
    losses, shares = (model.loss.by_rows, other.loss.by_rows), (model.accuracy.by_rows, other.accuracy.by_rows)
    if losses[0] is not None and losses[1] is not None and losses[0] > losses[1] + _least(losses[1]):
        return True
    scored = (one.validation.get("global") for one in (results.kept.clients.values() if results.kept else ()))
    labelled = sum(one.rows or 0 for one in scored if one is not None and one.accuracy is not None)
    if shares[0] is None or shares[1] is None or not labelled:
        return False
    return shares[1] - shares[0] > _chance([labelled])


def _reached(found: Together) -> str:
    share = "" if found.accuracy.by_rows is None else f" and {percent(found.accuracy.by_rows)} % right"
    return f"a loss of {decimals(found.loss.by_rows)}{share}"


def _not_learned(results: Results) -> Iterator[Hindrance]:
    if "llm" not in results.evaluation or "centralized" not in results.evaluation:
        return
    before, after = results.evaluation["llm"].tasks, results.evaluation["centralized"].tasks
    for task in results.tasks:
        if task in before and task in after and _differs(results, after[task] - before[task], task) is False:
            yield Hindrance(
                "not learned",
                f"Even tuned on all clients' pooled rows the LLM gains no more on {task} than chance may give: "
                f"{percent(after[task])} %, and {percent(before[task])} % untuned.",
                f"Leave {task} out of [evaluate] tasks, or give it more rows and steps: as it is, it says nothing of "
                "the federation.",
            )


def _damaged(results: Results) -> Iterator[Hindrance]:
    llm, tuned, said = results.average("llm"), results.average("proxy_tuned"), list[str]()
    if (perplexity := results.proxy.perplexity) is not None and perplexity.proxy > DAMAGED * perplexity.llm:
        said.append(
            f"On public text the proxy's perplexity is {decimals(perplexity.proxy, 0)}, the LLM's "
            f"{decimals(perplexity.llm, 0)}: much of what the LLM knows is lost with its blocks."
        )
    if llm is not None and tuned is not None and _differs(results, llm - tuned, *results.tasks):
        said.append(f"The tuned proxy ({percent(tuned)} %) stays below the untuned LLM ({percent(llm)} %).")
    proxy, untuned = results.kept and results.kept.validation.merged, results.validation.llm
    if (llm is None or tuned is None) and proxy and untuned and _below(results, proxy, untuned):
        said.append(
            f"On the rows that clients keep back the tuned proxy reaches {_reached(proxy)}, which is worse than the "
            f"untuned LLM with {_reached(untuned)}."
        )
    if said:
        yield Hindrance(
            "damaged proxy",
            " ".join(said),
            f"{MORE_STEPS}, refit the proxy on public text ([heal] refit = 512), or remove fewer blocks ([compress] "
            "remove).",
        )


def _interference(results: Results) -> Iterator[Hindrance]:
    kept = results.kept
    if kept is None or kept.validation.untuned is None:
        return
    untuned, own, merged = (
        _loss(found) for found in (kept.validation.untuned, kept.validation.own, kept.validation.merged)
    )
    if untuned is None or own is None or merged is None or untuned - own < _least(untuned):
        return
    if (untuned - merged) < (1 - LOST) * (untuned - own):
        yield Hindrance(
            "interference",
            f"On the rows that clients keep back, a client's own update brings the loss from {decimals(untuned)} to "
            f"{decimals(own)}, the merged adapter to {decimals(merged)}: the merge loses "
            f"{percent((merged - own) / (untuned - own))} % of what the clients gain.",
            "Merge more often: more rounds with fewer [train] epochs, or in the space of the products ([federate] "
            'space = "product").',
        )


def _loss(found: Together | None) -> float | None:
    return None if found is None else found.loss.by_clients


def _least(loss: float) -> float:
    """The smallest change of a loss that counts."""
    return max(CHANGED * loss, VISIBLE)


def _rising(results: Results) -> Iterator[Hindrance]:
    risen = [
        (new - old, name, before.number, after.number, old, new)
        for before, after in pairwise(_course(results))
        for name in before.clients.keys() & after.clients.keys()
        if (old := before.clients[name].loss) is not None
        and (new := after.clients[name].loss) is not None
        and new > old + _least(old)
    ]
    if not risen:
        return
    _, name, first, second, old, new = max(risen)
    others = len({each[1] for each in risen}) - 1
    yield Hindrance(
        "rising loss",
        f"The training loss of {name} rises from round {first} to round {second}, from {decimals(old)} to "
        f"{decimals(new)}: the merge took away what {name} had learned, or the learning rate is too high."
        + f" {count(others, 'other client')} saw such a rise, too."
        * (others > 0),
        "Lower [train] learning_rate, or merge more often: more rounds with fewer [train] epochs.",
    )


def _falling(results: Results) -> Iterator[Hindrance]:
    course = _course(results)
    if len(course) < 2:
        return
    validated = [_loss(one.validation.merged) for one in course[-2:]]
    what, losses = ("training loss", [one.loss for one in course[-2:]])
    if None not in validated:
        what, losses = "loss on the rows that clients keep back", validated
    before, after = losses
    if before is None or after is None or after > before - _least(before):
        return
    steps = Counter[str]()
    for one in course:
        steps.update({name: client.steps or 0 for name, client in one.clients.items()})
    taken = ""
    if most := max(steps.values(), default=0):
        taken = f" A client has taken {count(most, 'step')} by then"
        taken += f", centralized tuning takes {steps.total()}." if "centralized" in results.evaluation else "."
    yield Hindrance(
        "falling loss",
        f"The {what} still falls in the last round, from {decimals(before)} to {decimals(after)}.{taken}",
        f"{MORE_STEPS}, or a higher [train] learning_rate.",
    )


def _course(results: Results) -> list[Round]:
    """The rounds up to the one whose adapter is the result."""
    kept = results.kept
    return [one for one in results.rounds if kept is None or one.number <= kept.number]


def _plug_in(results: Results) -> Iterator[Hindrance]:
    tuned, fused, said = results.average("proxy_tuned"), results.average("fused"), ""
    proxy, llm = results.kept and results.kept.validation.merged, results.validation.fused
    if tuned is not None and fused is not None:
        if _differs(results, tuned - fused, *results.tasks):
            said = (
                f"Put back onto the LLM, the tuning loses {points(tuned - fused).lstrip('+')}: the tuned proxy reaches "
                f"{percent(tuned)} %, the fused LLM {percent(fused)} %."
            )
    elif proxy and llm and _below(results, llm, proxy):
        said = (
            f"Put back onto the LLM, the tuning loses: on the rows that clients keep back the tuned proxy reaches "
            f"{_reached(proxy)}, the tuned LLM {_reached(llm)}."
        )
    if said:
        yield Hindrance(
            "plug-in",
            said,
            "Make the update larger (a higher [train] learning_rate, or a scale chosen by public text that is like the "
            'rows: [fuse] scale = "auto", public = FILE), remove fewer blocks ([compress] remove), or do not plug in: '
            "the tuned proxy steers the untouched LLM at decode time (fedproxy evaluate LLM --proxy RUN/proxy "
            "--adapter RUN/adapter), or is served itself.",
        )
