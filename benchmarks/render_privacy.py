"""The pages on privacy, for render.py; and what a budget costs, beside how long its noise is."""

from typing import Any

from render_audit import audited, beside
from render_comparison import LAB, RESULTS, ROOT, SMOLLM2, comparison, loaded, ranged
from render_secure import secured
from sections import filled

from fedproxy.config import Privacy, Train
from fedproxy.models.training import optimizer_steps
from fedproxy.privacy.plan import Plan

FLOAT = 4
SHORT = ("sets", "exposed", "MB up", "MB down")
"""Columns that the page on budgets does without: its text says what the rows set."""
_BUDGETS = {f"epsilon-{budget}": "fedproxy" for budget in (8, 3, 1)}
PAIRS = {
    ("laboratory", LAB / "private.json"): _BUDGETS,
    ("demo", LAB / "private_demo.json"): _BUDGETS,
    ("SmolLM2", SMOLLM2 / "private.json"): _BUDGETS,
    ("demo's LLM", LAB / "private_rows.json"): {
        "epsilon-8": "fedproxy",
        "epsilon-8-256": "256",
        "epsilon-8-small": "small",
        "epsilon-8-small-256": "small-256",
        "epsilon-1-small-256": "small-256",
    },
}
"""Comparison → its private rows → the row with the same settings without privacy."""


def privacy_pages() -> dict[str, str]:
    """docs/privacy.md, docs/privacy_budget.md and docs/secure_sums.md with their tables, by path."""
    audit, sums = (loaded(RESULTS / f"{name}.json") for name in ("audit", "secure_sums"))
    sections = {
        "docs/privacy.md": {"audit": audited(audit)},
        "docs/privacy_budget.md": {
            "private": "\n\n".join(comparison(name, without=SHORT) for name in ("private", "private_demo")),
            "rows": comparison("private_rows", without=SHORT),
            "noise": noise_and_cost(),
            "real": comparison("private", SMOLLM2, SHORT),
            "beside": beside(audit, loaded(LAB.parent / "audits" / "private_run.json")),
        },
        "docs/secure_sums.md": {
            "secure": secured(sums),
            "compared": "\n\n".join(map(comparison, ("secure", "secure_demo"))),
        },
    }
    pages = {}
    for path, rendered in sections.items():
        pages[path] = (ROOT / path).read_text()
        for name, section in rendered.items():
            pages[path] = filled(pages[path], name, section)
    return pages


def noise_and_cost() -> str:
    """Each private row with the noise of its steps and what it keeps of the gain, loudest first."""
    rows = [row for (where, path), pairs in PAIRS.items() for row in _rows(where, loaded(path), pairs)]
    lines = [
        "| where | rows a client, in a step | trained values | ε | noise, in clips | accuracy, % | the same without noise | of its gain kept |",
        "|---" * 8 + "|",
    ]
    for norms, cells in sorted(rows, key=lambda row: -row[0]):
        lines.append(f"| {' | '.join([*cells[:4], f'{norms:.2g}', *cells[4:]])} |")
    return "\n".join(lines)


def _rows(where: str, result: dict[str, Any], pairs: dict[str, str]) -> list[tuple[float, list[str]]]:
    found = {row["method"]: row["accuracy"] for row in result["summary"]}
    variants = {one["name"]: one["train"] for one in result["compare"]["variant"]}
    experiment, untuned = result["experiment"], found["zero-shot"]["mean"]
    base, rounds, clients = experiment["train"], experiment["federate"]["rounds"], experiment["client"]
    rows = clients[0]["rows"]
    made = []
    for private, plain in pairs.items():
        settings: dict[str, Any] = {**base, **variants[private]}
        train = Train(**settings | {"privacy": None, "padding_free": False})
        [sent] = {cell["bytes_up"] for cell in result["cells"] if cell["method"] == private}
        parameters = sent // (FLOAT * len(clients) * rounds)
        privacy = Privacy(**settings["privacy"])
        plan = Plan.of(privacy, train, rows=rows, steps=optimizer_steps(rows, train), rounds=rounds)
        kept = (found[private]["mean"] - untuned) / (found[plain]["mean"] - untuned)
        batch = f"{rows:,}, {plan.batch}"
        cells = [
            where,
            batch,
            f"{parameters:,}",
            f"{privacy.epsilon:g}",
            ranged(found[private]),
            ranged(found[plain]),
            f"{kept:.0%}",
        ]
        made.append((plan.norms(parameters), cells))
    return made
