"""A comparison in a few sentences; "better" and "worse" only as of `metrics.verdict`."""

from fedproxy.methods import CENTRALIZED, FEDPROXY, ZERO_SHOT
from fedproxy.records import Difference
from fedproxy.reporting.rows import Compared, Row
from fedproxy.reporting.units import count, percent, points

OTHERS = (CENTRALIZED, "fedavg", ZERO_SHOT)
"""What FedProxy is set against in words."""


def sentences(found: Compared) -> list[str]:
    """What was run, which method is ahead, how FedProxy stands to others, and what the numbers do not say."""
    return [_setup(found), *(text for remove in found.ratios for text in _at(found, remove)), *_limits(found)]


def _setup(found: Compared) -> str:
    methods = len({row.method for row in found.rows})
    parts = [count(len(found.seeds), "seed"), count(len(found.tasks), "task")]
    if found.clients is not None:
        parts.append(count(found.clients, "client"))
    ratios = listed([percent_short(remove) for remove in found.ratios])
    return (
        f"{count(methods, 'method')} on the same work: {listed(parts)}; a proxy is the LLM without {ratios} % of its "
        "blocks."
    )


def _at(found: Compared, remove: float) -> list[str]:
    rows = [row for row in found.rows if row.remove == remove]
    where = f"With {percent_short(remove)} % removed, " if len(found.ratios) > 1 else ""
    said = []
    if len(rows) > 1:
        said.append(_capital(f"{where}{_best(found, rows)}"))
    stands = [
        _stands(difference) for other in OTHERS if (difference := found.difference(FEDPROXY, other, remove)) is not None
    ]
    if stands:
        said.append(_capital(f"{where}{FEDPROXY} is {'; '.join(stands)}."))
    row = found.row(FEDPROXY, remove)
    gap = row.spread("gap_closed") if row else None
    if gap is not None:
        span = f" ({percent(gap.low)} to {percent(gap.high)} % over the seeds)" if gap.low < gap.high else ""
        said.append(
            _capital(
                f"{where}{FEDPROXY} goes {percent(gap.mean)} % of the way from the untuned LLM to centralized "
                f"tuning{span}."
            )
        )
    return said


def _best(found: Compared, rows: list[Row]) -> str:
    best, federated = _leaders(rows), [row for row in rows if _federates_a_proxy(found, row)]
    text = f"the highest mean accuracy is that of {_named(best)}"
    if len(best) == 1 and found.methods.get(best[0].method, {}).get("data") == "each":
        text += ", which is one model for each client"
    if len(federated) < 2:
        return text + "."
    first, group = _leaders(federated), f"the {len(federated)} methods that federate a proxy"
    if first[0] not in best:
        return f"{text}; of {group}, that of {_named(first)}."
    return f"{text}, which is one of {group}." if len(best) == 1 else text + "."


def _leaders(rows: list[Row]) -> list[Row]:
    """The rows of the highest mean accuracy."""
    highest = max(row.accuracy.mean for row in rows)
    return [row for row in rows if row.accuracy.mean >= highest - 1e-9]


def _named(rows: list[Row]) -> str:
    span = _accuracy(rows[0]) if len(rows) == 1 else f"{percent(rows[0].accuracy.mean)} %"
    return f"{listed([row.method for row in rows])}, {span}"


def _federates_a_proxy(found: Compared, row: Row) -> bool:
    exposed = row.mean("exposed")
    return found.methods.get(row.method, {}).get("data") == "clients" and exposed is not None and exposed < 1


def _accuracy(row: Row) -> str:
    spread = row.accuracy
    span = f" ({percent(spread.low)} to {percent(spread.high)} %)" if spread.low < spread.high else ""
    return f"{percent(spread.mean)} %{span}"


def in_words(found: Difference) -> str:
    """A verdict as the words before the other method's name, such as "not told apart from"."""
    return {"better": "better than", "worse": "worse than"}.get(found.verdict, "not told apart from")


def _stands(found: Difference) -> str:
    signs = ""
    if found.verdict == "undecided" and (found.low > 0 or found.high < 0):
        alike = sum(value * found.mean > 0 for value in found.by_seed)
        signs = f", that way with {alike} of {count(len(found.by_seed), 'seed')} alone"
    return f"{in_words(found)} {found.against}: {interval(found)}{signs}"


def interval(found: Difference) -> str:
    """A difference with its interval, such as "+1.2 points (−0.3 to +2.7)"."""
    low, high = (points(end).removesuffix(" points") for end in (found.low, found.high))
    return f"{points(found.mean)} ({low} to {high})"


def _limits(found: Compared) -> list[str]:
    said = []
    if found.differences:
        level = found.differences[0].level
        said.append(
            f"Differences are of the mean over the tasks, document by document, with {percent_short(level)} % "
            "bootstrap intervals over the documents: they say how far other documents would move the difference "
            "between these trainings, not how far another seed would."
        )
    left_out = {task: why for row in found.rows for cell in row.cells for task, why in cell.accuracy.left_out.items()}
    if left_out:
        said.append(f"In no mean and no difference: {listed([f'{task} ({why})' for task, why in left_out.items()])}.")
    if len(found.seeds) == 1:
        said.append("There is one seed: how far another one would move a number is not known from this page.")
    uneven = [row.label for row in found.rows if len(row.cells) < len(found.seeds)]
    if uneven:
        said.append(f"Not every seed was run with {listed(uneven)}: their means are of fewer numbers.")
    return said


def percent_short(share: float) -> str:
    """A share in per cent without needless digits, without the sign.

    Example:
        >>> percent_short(0.25)
        '25'
    """
    return f"{100 * share:.4g}"


def listed(parts: list[str]) -> str:
    """Parts of a sentence, the last after "and".

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:] if text.startswith("the ") else text
