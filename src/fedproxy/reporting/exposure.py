"""What the clients hold of the LLM, and how far an attacker comes with it, in a few sentences."""

from collections.abc import Sequence

from fedproxy.attack_records import ACCURACY_GAP, API_ALONE, AS_IT_IS, FROM_PROXY, OWN_PROXY, WAY, Attacks, Figure
from fedproxy.foreign import plain
from fedproxy.records import Results
from fedproxy.reporting.units import count, percent

_MEASURES = {
    WAY: "On public text, by the loss, the share of the way to the LLM",
    ACCURACY_GAP: "On the run's tasks, by the accuracy, the share of the gap to the LLM",
}
_LONGEST = 120
"""Letters of an attacker's name that are shown."""


def held(results: Results) -> str:
    """What of the LLM every client has; empty where the run did not record it."""
    if not results.llm.blocks or not results.proxy.layer_map:
        return ""
    share = f", {percent(results.exposed)} % of its parameters" if results.exposed is not None else ""
    kept = f"{len(results.proxy.layer_map)} of the LLM's {count(results.llm.blocks, 'block')}{share}"
    return f"Every client keeps the proxy: {kept}."


def quoted(attacks: Attacks) -> list[str]:
    """What the attack llm-from-proxy found of the run's own proxy, a sentence for each measure; none if nothing."""
    attack = attacks.attacks.get(FROM_PROXY)
    figures = attack.figures if attack is not None else []
    return [
        sentence
        for measure in _MEASURES
        if (sentence := _quoted(measure, [f for f in figures if f.measure == measure]))
    ]


def _quoted(measure: str, figures: Sequence[Figure]) -> str:
    own = [figure for figure in figures if figure.where.startswith(OWN_PROXY)]
    plainly = next((figure for figure in own if figure.where.endswith(AS_IT_IS)), None)
    if plainly is None:
        return ""
    best = max(own, key=lambda figure: figure.value)
    text = f"{_MEASURES[measure]} is {_share(plainly)} for the proxy as it is"
    text += ", and no attacker came further" if best is plainly else f", {_share(best)} for the best attacker"
    text += f" ({plain(best.where.removeprefix(f'{OWN_PROXY}, '), _LONGEST)})" * (best is not plainly)
    alone = [figure for figure in figures if figure.where.startswith(API_ALONE)]
    if alone:
        text += f"; without the proxy, with the API alone, {_share(max(alone, key=lambda figure: figure.value))}"
    return f"{text}."


def _share(figure: Figure) -> str:
    """A share as a percentage, with its interval if it has one."""
    if figure.low is None or figure.high is None:
        return f"{percent(figure.value)} %"
    return f"{percent(figure.value)} % (95 % interval {percent(figure.low)} to {percent(figure.high)})"
