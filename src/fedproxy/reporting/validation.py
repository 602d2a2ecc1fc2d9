"""What clients state of a run's adapters on rows that they keep back, as figures."""

from collections.abc import Mapping, Sequence

from fedproxy.records import Results, Round, Together
from fedproxy.reporting import plots

MODELS = {"untuned": "Untuned", "own": "Own update", "alone": "Trained alone", "merged": "Round’s adapter"}
"""Fields of `records.Validation`, and what their models are called."""
_MEAN, _ALONE = "Mean by rows", "Trained alone"
_NAMED_CLIENTS = 8
_WIDE = 10.0
"""Losses further apart than by this factor get a logarithmic axis, on which the later rounds can be told apart."""


def rounds_of(results: Results) -> list[Round]:
    """The rounds whose adapter anyone scored."""
    return [each for each in results.rounds if each.validation.merged is not None]


def scored_models(rounds: Sequence[Round]) -> dict[str, str]:
    """Those of `MODELS` that anyone scored in any of the rounds."""
    return {field: what for field, what in MODELS.items() if any(getattr(one.validation, field) for one in rounds)}


def reached(results: Results) -> dict[str, Together]:
    """What each model reaches on the rows that clients keep back: the proxy in the round that is kept, and the LLM."""
    if results.kept is None or results.kept.validation.merged is None:
        return {}
    told, llm = results.kept.validation, results.validation
    found = {
        "Proxy, untuned": told.untuned,
        "Proxy, own update": told.own,
        "Proxy, trained alone": told.alone,
        "Tuned proxy": told.merged,
        "LLM, untuned": llm.llm,
        "Tuned LLM": llm.fused,
    }
    return {name: one for name, one in found.items() if one is not None}


def figures(rounds: Sequence[Round]) -> dict[str, str]:
    """Name → inline SVG: loss and, where there are labels, accuracy by round; call it inside `svg.drawing()`."""
    found = {}
    for field, title, axis, factor in (
        ("loss", "Validation loss by round", "loss (nats a token)", 1.0),
        ("accuracy", "Validation accuracy by round", "accuracy (%)", 100.0),
    ):
        courses = _courses(rounds, field, factor)
        if courses:
            found[f"validation_{field}"] = plots.lines(
                courses,
                name=f"validation-{field}",
                title=title,
                axis=axis,
                each=f"in {axis}",
                own={_MEAN},
                log=field == "loss" and _is_wide(courses),
            )
    return found


def _is_wide(courses: Mapping[str, Mapping[int, float]]) -> bool:
    values = [value for course in courses.values() for value in course.values()]
    return 0 < _WIDE * min(values) < max(values)


def _courses(rounds: Sequence[Round], field: str, factor: float) -> dict[str, dict[int, float]]:
    """Means, and each client if they are few → round → value; the untuned proxy in the place of a round 0."""
    mean, alone, clients = dict[int, float](), dict[int, float](), dict[str, dict[int, float]]()
    for round_ in rounds:
        told = round_.validation
        for course, number, together in (
            (mean, 0, told.untuned),
            (mean, round_.number, told.merged),
            (alone, round_.number, told.alone),
        ):
            value = None if together is None else getattr(together, field).by_rows
            if value is not None:
                course[number] = factor * value
        for name, client in round_.clients.items():
            for model, number in (("untuned", 0), ("global", round_.number)):
                value = getattr(client.validation[model], field) if model in client.validation else None
                if value is not None:
                    clients.setdefault(name, {})[number] = factor * value
    named: Mapping[str, dict[int, float]] = clients if len(clients) <= _NAMED_CLIENTS else {}
    found = {_MEAN: mean, _ALONE: alone, **{_own(name): course for name, course in named.items()}}
    return {name: dict(sorted(course.items())) for name, course in found.items() if course}


def _own(name: str) -> str:
    """A client's name that is not that of a mean."""
    return f"{name} (client)" if name in (_MEAN, _ALONE) else name
