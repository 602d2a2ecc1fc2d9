"""The tables of docs/privacy.md: who sees what, and how far each attack comes on the demo."""

from typing import Any

from audit import ALL, OWN

from fedproxy.attack_records import ACCURACY_GAP, API_ALONE, FROM_PROXY, WAY


def audited(result: dict[str, Any]) -> str:
    """The attacks on the demo's run, and the LLM from proxies of other blocks.

    Args:
        result: What benchmarks/results/audit.json holds.
    """
    lines = ["| attack | who sees what | where | measure | value | 95 % interval | by chance |", "|---" * 7 + "|"]
    for name, attack in result["attacks"][OWN].items():
        for number, figure in enumerate(attack["figures"]):
            first = (f"{attack['title']} (`{name}`, {attack['paper']})", attack["sees"]) if not number else ("", "")
            lines.append(f"| {first[0]} | {first[1]} | {figure['where']} | {figure['measure']} | {numbers(figure)} |")
    notes = [note for attack in result["attacks"][OWN].values() for note in (*attack["missing"], *attack["notes"])]
    lines += ["", *(f"- {note}" for note in notes)]
    more = result["attacks"][ALL][FROM_PROXY]["figures"]
    for measure, by in ((WAY, "the loss on public text"), (ACCURACY_GAP, "the accuracy on the run's tasks")):
        if figures := [figure for figure in more if figure["measure"] == measure]:
            lines += ["", f"By {by}, the {measure}:", "", others(figures)]
    return "\n".join(lines)


def beside(result: dict[str, Any], private: dict[str, Any]) -> str:
    """The attacks on the demo's run without a budget and with one.

    Args:
        result: What benchmarks/results/audit.json holds.
        private: What experiments/lab/audits/private_run.json holds.
    """
    lines = ["| attack | where | measure | without | ε = 8 | by chance |", "|---" * 6 + "|"]
    for name, attack in private["attacks"].items():
        without = {(one["where"], one["measure"]): one for one in result["attacks"][OWN][name]["figures"]}
        for figure in attack["figures"]:
            where, measure = figure["where"], figure["measure"]
            if (before := without.get((where, measure))) and ("mean over" in where or "steps" in where):
                values = [shown(one) for one in (before["value"], figure["value"], figure["chance"])]
                lines.append(f"| `{name}` | {where} | {measure} | {' | '.join(values)} |")
    return "\n".join(lines)


def others(figures: list[dict[str, Any]]) -> str:
    """What one measure says by proxy and attacker, one row a proxy."""
    rows: dict[str, list[str]] = {}
    alone, attackers = [], dict[str, None]()
    for figure in figures:
        proxy, _, attacker = figure["where"].rpartition(", ")
        proxy = proxy.removesuffix(", healed")
        if proxy.startswith(API_ALONE):
            alone.append(f"{with_interval(figure)} after {attacker}")
            continue
        attackers[f"healed, {attacker}" if attacker.endswith(" steps") else attacker] = None
        rows.setdefault(proxy, []).append(with_interval(figure))
    lines = [f"| proxy | {' | '.join(attackers)} |", "|---" * (1 + len(attackers)) + "|"]
    lines += [f"| {proxy} | {' | '.join(values)} |" for proxy, values in rows.items()]
    return "\n".join([*lines, "", f"With the API alone, and no proxy: {', '.join(alone)}."])


def numbers(figure: dict[str, Any]) -> str:
    """Value, interval and chance of a figure, as cells."""
    low, high, chance = (figure[key] for key in ("low", "high", "chance"))
    interval = "–" if low is None else f"{shown(low)} to {shown(high)}"
    return f"{shown(figure['value'])} | {interval} | {'–' if chance is None else shown(chance)}"


def with_interval(figure: dict[str, Any]) -> str:
    """A figure's value, and its interval in brackets if it has one."""
    if figure["low"] is None:
        return shown(figure["value"])
    return f"{shown(figure['value'])} ({shown(figure['low'])} to {shown(figure['high'])})"


def shown(value: float) -> str:
    """A number with two decimals."""
    return f"{value:z.2f}".replace("-", "−")
