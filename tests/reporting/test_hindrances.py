"""What holds a result back: each kind is told of figures that show it, and of no others."""

import contextlib
import copy

import pytest

from fedproxy.errors import ArtifactError
from fedproxy.reporting import hindrances_table
from fedproxy.reporting.hindrances import CHANGED, CLOSED, DAMAGED, LOST, VISIBLE, hindrances

from .sample import TASKS, changed, parse, paths, sample, scored


@pytest.fixture
def raw():
    """A run of which nothing is known that holds it back, though its gap is not closed."""
    found = sample()
    found["evaluation"] = {
        model: scored([value] * 4, TASKS)
        for model, value in {"llm": 0.5, "proxy_tuned": 0.7, "fused": 0.7, "centralized": 0.9}.items()
    }
    for one in found["rounds"]:
        one.pop("validation", None)
        for client in one["clients"].values():
            client |= {"loss": 1.0, "steps": 10}
    return found


def kinds(raw):
    return [found.kind for found in hindrances(parse(raw))]


def move(raw, model, value, task=None):
    raw = copy.deepcopy(raw)
    values = [one["acc"] for one in raw["evaluation"][model]["tasks"].values()]
    values = [value if task in (None, name) else old for name, old in zip(TASKS, values, strict=True)]
    raw["evaluation"][model] = scored(values, TASKS)
    return raw


def validated(raw, **losses):
    raw = copy.deepcopy(raw)
    raw["rounds"][-1]["validation"] = {
        model: {"clients": 4, "rows": 40, "loss": {"by_rows": loss, "by_clients": loss}, "accuracy": {}}
        for model, loss in losses.items()
    }
    return raw


def test_nothing_is_said_without_a_figure_that_says_it(raw):
    assert kinds(raw) == []
    assert kinds({}) == []
    assert hindrances_table(raw) is None


def test_a_closed_gap_has_no_hindrance(raw):
    raw["rounds"][-1]["clients"]["bank"]["loss"] = 9.0
    assert kinds(raw) == ["rising loss"]
    assert kinds(move(raw, "fused", 0.5 + 0.4 * CLOSED + 1e-9)) == []


def test_a_task_that_nobody_learns(raw):
    # 150 rows: two standard errors of a difference are 2 · √(0.5 / 150) = 0.115.
    assert kinds(move(raw, "centralized", 0.61, "demo_banking")) == ["not learned"]
    assert kinds(move(raw, "centralized", 0.62, "demo_banking")) == []
    found = hindrances(parse(move(raw, "centralized", 0.5, "demo_banking")))
    assert "demo_banking" in found[0].found


def test_of_a_task_without_its_number_of_rows_nothing_is_said(raw):
    raw = move(move(raw, "centralized", 0.5), "proxy_tuned", 0.1)
    assert kinds(raw) == ["not learned"] * 4 + ["damaged proxy"]
    for model in raw["evaluation"].values():
        for task in model["tasks"].values():
            del task["n"]
    assert kinds(raw) == []


def test_a_proxy_that_is_too_damaged(raw):
    raw["proxy"]["perplexity"] = {"llm": 10.0, "proxy": 10.0 * DAMAGED}
    assert kinds(raw) == []
    raw["proxy"]["perplexity"]["proxy"] += 0.1
    assert kinds(raw) == ["damaged proxy"]
    del raw["proxy"]["perplexity"]
    # 4 tasks of 150 rows: two standard errors of the mean's difference are 0.058.
    assert kinds(move(raw, "proxy_tuned", 0.45)) == []
    assert kinds(move(raw, "proxy_tuned", 0.44)) == ["damaged proxy"]


def test_a_merge_that_loses_what_clients_gained(raw):
    assert kinds(validated(raw, untuned=3.0, own=1.0, **{"global": 1.0 + 2 * LOST})) == []
    assert kinds(validated(raw, untuned=3.0, own=1.0, **{"global": 1.01 + 2 * LOST})) == ["interference"]
    assert kinds(validated(raw, untuned=3.0, own=2.9, **{"global": 3.0})) == []  # who gains nothing loses nothing
    assert kinds(validated(raw, untuned=3.0, own=1.0)) == []


def test_a_client_whose_loss_rises(raw):
    raw["rounds"][2]["clients"]["travel desk"]["loss"] = 1.0 + CHANGED
    assert kinds(raw) == []
    raw["rounds"][2]["clients"]["travel desk"]["loss"] += 0.01
    [found] = hindrances(parse(raw))
    assert found.kind == "rising loss"
    assert "travel desk rises from round 2 to round 3" in found.found


def test_a_loss_that_still_falls(raw):
    for client in raw["rounds"][-1]["clients"].values():
        client["loss"] = 1.0 - CHANGED + 0.001
    assert kinds(raw) == []
    for client in raw["rounds"][-1]["clients"].values():
        client["loss"] = 1.0 - CHANGED
    [found] = hindrances(parse(raw))
    assert found.kind == "falling loss"
    assert "50 steps" in found.found  # of a client in five rounds
    assert f"{50 * len(raw['rounds'][-1]['clients'])}" in found.found  # of all
    raw["kept_round"] = 4  # the last one does not count
    assert kinds(raw) == []


def test_held_back_rows_say_more_than_training_rows(raw):
    raw = validated(raw, **{"global": 1.0})
    raw["rounds"][-2]["validation"] = validated(raw, **{"global": 2.0})["rounds"][-1]["validation"]
    assert kinds(raw) == ["falling loss"]
    for client in raw["rounds"][-1]["clients"].values():
        client["loss"] = 0.1
    raw["rounds"][-2]["validation"]["global"]["loss"]["by_clients"] = 1.0
    assert kinds(raw) == []


def test_an_update_that_does_not_survive_plugging_in(raw):
    assert kinds(move(raw, "fused", 0.65)) == []
    assert kinds(move(raw, "fused", 0.64)) == ["plug-in"]


def on_held_back_rows(raw, proxy, llm, fused, rows=50):
    """Pairs of a loss and an accuracy, of a run in which no task was scored."""
    raw = copy.deepcopy(raw) | {"evaluation": {}}
    told = {
        name: {
            "clients": 1,
            "rows": rows,
            "loss": {"by_rows": loss, "by_clients": loss},
            "accuracy": {"by_rows": share},
        }
        for name, (loss, share) in {"global": proxy, "llm": llm, "fused": fused}.items()
    }
    raw["rounds"][-1]["validation"] = {"global": told["global"]}
    for client in raw["rounds"][-1]["clients"].values():
        client["validation"] = {}
    client["validation"] = {"global": {"loss": proxy[0], "accuracy": proxy[1], "rows": rows}}
    raw["validation"] = {"llm": told["llm"], "fused": told["fused"]}
    return raw


def test_without_a_task_held_back_rows_say_that_an_update_does_not_survive(raw):
    proxy, llm = (1.0, 0.84), (3.0, 0.5)
    # 50 rows: two standard errors of a difference are 2 · √(0.5 / 50) = 0.2.
    assert kinds(on_held_back_rows(raw, proxy, llm, (1.0 + CHANGED, 0.65))) == []
    assert kinds(on_held_back_rows(raw, proxy, llm, (1.0, 0.63))) == ["plug-in"]
    assert kinds(on_held_back_rows(raw, proxy, llm, (1.01 + CHANGED, 0.84))) == ["plug-in"]
    assert kinds(on_held_back_rows(raw, (1.0, None), llm, (1.01 + CHANGED, None))) == ["plug-in"]
    [found] = hindrances(parse(on_held_back_rows(raw, proxy, llm, (1.5, 0.6))))
    assert "a loss of 1.000 and 84.0 % right, the tuned LLM a loss of 1.500 and 60.0 % right" in found.found


def test_without_a_task_held_back_rows_say_that_a_proxy_is_too_damaged(raw):
    fused = (0.5, 0.9)
    assert kinds(on_held_back_rows(raw, (1.0 + CHANGED, 0.6), (1.0, 0.79), fused)) == []
    assert kinds(on_held_back_rows(raw, (1.0, 0.6), (1.0, 0.81), fused)) == ["damaged proxy"]
    assert kinds(on_held_back_rows(raw, (1.01 + CHANGED, 0.6), (1.0, 0.6), fused)) == ["damaged proxy"]


def test_scored_tasks_count_for_more_than_held_back_rows(raw):
    found = on_held_back_rows(raw, (1.0, 0.84), (3.0, 0.5), (9.0, 0.1))
    assert kinds(found) == ["plug-in"]
    assert kinds(found | {"evaluation": raw["evaluation"]}) == []


def test_models_scored_on_other_rows_are_not_compared(raw):
    found = on_held_back_rows(raw, (1.0, 0.84), (3.0, 0.5), (9.0, 0.1))
    found["validation"]["fused"]["rows"] = 49
    assert kinds(found) == []


def test_of_several_clients_whose_loss_rises_the_worst_is_named_once(raw):
    raw["rounds"][1]["clients"]["bank"]["loss"] = 1.5
    raw["rounds"][4]["clients"]["travel desk"]["loss"] = 3.0
    [found] = hindrances(parse(raw))
    assert "travel desk rises from round 4 to round 5, from 1.000 to 3.000" in found.found
    assert "1 other client" in found.found


def test_what_cannot_be_seen_is_not_told(raw):
    for number, one in enumerate(raw["rounds"]):
        for client in one["clients"].values():
            client["loss"] = (number % 2) * VISIBLE / 2
    assert kinds(raw) == []
    assert kinds(validated(raw, untuned=0.0, own=0.0, **{"global": 1.0})) == []


def test_rounds_without_a_client_are_no_reason_to_fail(raw):
    raw = validated(raw, **{"global": 1.0})
    raw["rounds"][-2]["validation"] = validated(raw, **{"global": 2.0})["rounds"][-1]["validation"]
    for one in raw["rounds"]:
        one["clients"] = {}
    assert kinds(raw) == ["falling loss"]


@pytest.mark.parametrize("value", [0, -1.0, 1e30, -1e30])
def test_no_number_that_a_file_may_hold_is_too_much(raw, value):
    raw["validation"] = on_held_back_rows(raw, (1.0, 0.84), (3.0, 0.5), (9.0, 0.1))["validation"]
    for place in paths(raw):
        part = raw
        for key in place:
            part = part[key]
        if isinstance(part, float | int) and place[0] in ("rounds", "proxy", "evaluation", "validation"):
            with contextlib.suppress(ArtifactError):
                hindrances(parse(changed(raw, place, value)))
