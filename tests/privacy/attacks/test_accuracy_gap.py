from dataclasses import replace
from statistics import fmean

import pytest

from fedproxy.config import Evaluate
from fedproxy.demo import EXPERIMENT
from fedproxy.evaluation import evaluate
from fedproxy.models.checkpoints import fresh_model, load_model, save_checkpoint
from fedproxy.models.families import keep_blocks
from fedproxy.privacy.attacks.accuracy_gap import examination
from fedproxy.privacy.attacks.subject import Subject

TASKS = Evaluate(tasks=["demo_snips", "demo_banking"], include=str(EXPERIMENT.parent / "tasks"), limit=24)


@pytest.fixture
def scored(untouched):
    """A run whose models are scored on two tasks, a few documents of each."""
    subject = Subject(untouched)
    subject.experiment = replace(subject.experiment, evaluate=TASKS)
    return subject


@pytest.fixture
def blank(scored, tmp_path):
    (tmp_path / "blank").mkdir()
    save_checkpoint(tmp_path / "blank", fresh_model(scored.proxy, seed=0), scored.proxy)
    return tmp_path / "blank"


def test_accuracies_are_those_that_the_run_states_and_both_ends_have_the_shares_0_and_1(scored, blank):
    found = examination(scored, blank)
    for path, share, documents in ((scored.experiment.llm.path, 1.0, found.llm), (blank, 0.0, found.blank)):
        stated = evaluate(path, tasks=TASKS.tasks, include=TASKS.include, limit=TASKS.limit)
        assert {task: fmean(values) for task, values in documents.items()} == {
            task: pytest.approx(metrics["acc"]) for task, metrics in stated["tasks"].items()
        }
        (figure,) = found.figures("here", load_model(path))
        assert (figure.value, figure.low, figure.high) == (share, share, share)
        assert f"{stated['average']:.3f}" in figure.of
        assert f"{stated['average']:.3f}" in found.notes[0]
    assert not found.missing


def test_a_proxy_lies_between_as_its_accuracy_does(scored, blank):
    found = examination(scored, blank)
    stated = evaluate(scored.proxy, tasks=TASKS.tasks, include=TASKS.include, limit=TASKS.limit)["average"]
    low, high = (fmean(map(fmean, model.values())) for model in (found.blank, found.llm))
    (figure,) = found.figures("here", keep_blocks(load_model(scored.proxy), range(scored.manifest.llm_blocks // 2)))
    assert figure.value == pytest.approx((stated - low) / (high - low))
    assert figure.low <= figure.value <= figure.high


def test_where_the_ends_do_not_differ_there_is_no_share(scored):
    found = examination(scored, scored.experiment.llm.path)
    assert "no gap to tell" in found.missing[0]
    assert not list(found.figures("here", load_model(scored.proxy)))


@pytest.mark.parametrize(
    ("changes", "why"), [({"tasks": []}, "no task"), ({"include": "nowhere"}, "nowhere: no such folder")]
)
def test_a_run_without_tasks_that_can_be_scored_says_so(scored, blank, changes, why):
    scored.experiment = replace(scored.experiment, evaluate=replace(TASKS, **changes))
    found = examination(scored, blank)
    assert why in found.missing[0]
    assert not list(found.figures("here", load_model(blank)))
