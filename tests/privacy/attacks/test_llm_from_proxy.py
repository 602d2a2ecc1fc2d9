import math
from dataclasses import replace

import pytest
import torch

from fedproxy.attack_records import ACCURACY_GAP, WAY
from fedproxy.compression.heal_student import Student
from fedproxy.compression.teacher import perplexity_of
from fedproxy.config import Evaluate, Heal
from fedproxy.demo import EXPERIMENT
from fedproxy.models.checkpoints import fresh_model, load_tokenizer, save_checkpoint
from fedproxy.models.placement import open_stream
from fedproxy.models.source import open_source
from fedproxy.models.text_batches import Batch, batches
from fedproxy.privacy.attacks.llm_from_proxy import Options, counted_loss, filled, llm_from_proxy, student_loss
from fedproxy.privacy.attacks.subject import Subject

FULL = Heal(steps=1, mode="full")


@pytest.mark.slow
def test_the_proxy_brings_an_attacker_far_healing_further_and_the_api_alone_not(learned_by_heart):
    subject = Subject(learned_by_heart)
    tasks = Evaluate(tasks=["demo_snips", "demo_banking"], include=str(EXPERIMENT.parent / "tasks"), limit=60)
    subject.experiment = replace(subject.experiment, evaluate=tasks)
    found = llm_from_proxy(subject, Options(steps=4), lambda *_: None)
    shares, right = (
        {figure.where: figure.value for figure in found.figures if figure.measure == measure}
        for measure in (WAY, ACCURACY_GAP)
    )
    assert list(shares) == list(right)
    assert right["only the API, no proxy, 36 steps"] < 0.5
    assert shares["the run's proxy, as it is"] > 0.5
    assert shares["the run's proxy, as it is"] < shares["the run's proxy, healed, 36 steps"] < 1.0
    assert shares["only the API, no proxy, 36 steps"] < 0.3
    assert shares["the run's proxy, gaps filled by copies"] < 1.0


def test_a_students_loss_is_that_of_the_model_block_by_block(tiny_checkpoint):
    path = tiny_checkpoint("llama")
    source = open_source(path)
    texts = batches(load_tokenizer(path), ["one two three four", "five six", "seven"], max_length=16, batch_size=2)
    student = Student(source, FULL, [0], seed=0, longest=16, everything=True)
    assert math.exp(student_loss(student, texts)) == pytest.approx(
        perplexity_of(open_stream(open_source(path)), texts), rel=2e-2
    )
    assert any("embed" in name for name in student.parameters)
    assert not any("embed" in name for name in Student(source, FULL, [0], seed=0, longest=16).parameters)


def test_a_fresh_model_has_the_shape_and_none_of_the_weights(tiny_checkpoint, tmp_path):
    path = tiny_checkpoint("llama")
    drawn, again, other = (fresh_model(path, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert any(not torch.equal(drawn[name], other[name]) for name in drawn)
    (tmp_path / "blank").mkdir()
    save_checkpoint(tmp_path / "blank", fresh_model(path, seed=1), path)
    assert open_source(tmp_path / "blank").count == open_source(path).count


def test_counts_of_tokens_by_hand():
    def batch(*ids):
        return Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))

    loss = counted_loss([batch(0, 0, 1)], [batch(2, 0, 1)], 3)  # probabilities 3/6, 2/6, 1/6
    assert loss == pytest.approx(-(math.log(3 / 6) + math.log(2 / 6)) / 2)


@pytest.mark.parametrize(
    ("keep", "count", "order"),
    [([0, 3], 5, [0, 0, 1, 1, 1]), ([2], 4, [0, 0, 0, 0]), ([0, 1, 2], 3, [0, 1, 2]), ([0, 2], 3, [0, 0, 1])],
)
def test_gaps_are_filled_by_the_nearest_block(keep, count, order):
    assert filled(keep, count) == order
