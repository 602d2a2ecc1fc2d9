from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fedproxy.config import Train
from fedproxy.errors import UsageError
from fedproxy.models.encoding import Encoded, encode
from fedproxy.models.layouts import IGNORED, collate
from fedproxy.models.lora import adapter_parameters, adapter_state, attach
from fedproxy.models.private_training import Private
from fedproxy.models.training import DivergedError, train
from fedproxy.privacy.plan import Plan
from fedproxy.privacy.randomness import Randomness
from tests.conftest import make_model, make_tokenizer

WORDS = ("yes", "no", "perhaps", "never", "always", "sometimes")
ROWS = encode([{"prompt": f"say {w}:", "completion": f" {w}"} for w in WORDS], make_tokenizer(), max_length=32)
SETTINGS = Train(batch_size=6, max_steps=3, epochs=9.0, learning_rate=1e-2, lora_dropout=0.0, precision="fp32")
PLAN = Plan(clip=1e9, epsilon=1.0, delta=1e-3, rows=6, batch=6, steps=3, rounds=1, noise=0.0)
"""All rows in every step, no clipping and no noise."""


def adapted(dropout=0.0):
    return attach(make_model(num_hidden_layers=2), r=2, alpha=4, dropout=dropout, seed=0)


def trained(plan=PLAN, rows=ROWS, settings=SETTINGS, seed=0, dropout=0.0, **more):
    model = adapted(dropout)
    done = train(model, rows, settings, pad=256, seed=0, private=Private(plan, Randomness(seed)), **more)
    return adapter_state(model), done


def bare_loop(rows=ROWS, steps=3, penalty=None):
    """The oracle: AdamW on the mean over the rows of their mean cross-entropies."""
    model = adapted()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=SETTINGS.learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        batch = collate(rows, 256)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        loss = (each.sum(1) / (labels != IGNORED).sum(1)).mean()
        losses.append(loss.item())
        (loss + (penalty(model) if penalty else 0)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return adapter_state(model), losses


def close(one, other, atol=1e-5):
    return all(torch.allclose(value, other[name], atol=atol) for name, value in one.items())


@pytest.mark.parametrize("size", [6, 4, 1])
def test_without_noise_and_clipping_it_is_plain_training(size):
    """However many rows are computed at a time."""
    settings = replace(SETTINGS, batch_size=size)
    found, done = trained(settings=settings)
    expected, losses = bare_loop()
    assert close(found, expected)
    assert done.losses == pytest.approx(losses, rel=1e-5)


def test_rows_of_one_length_train_as_without_privacy():
    rows = [Encoded(list(range(begin, begin + 9)), 4) for begin in range(10, 70, 10)]
    found, _ = trained(rows=rows)
    model = adapted()
    train(model, rows, SETTINGS, pad=256, seed=0)
    assert close(found, adapter_state(model))


def test_checkpointing_changes_no_result():
    assert close(trained()[0], trained(settings=replace(SETTINGS, gradient_checkpointing=True))[0])


def test_a_penalty_stands_beside_what_is_clipped():
    """It is of parameters alone, and so neither clipped with the rows nor covered by noise."""

    def squares(parameters):
        return 0.5 * sum(p.square().sum() for p in parameters.values())

    found, _ = trained(penalty=squares)
    expected, _ = bare_loop(penalty=lambda model: squares(adapter_parameters(model)))
    assert close(found, expected)
    tight = replace(PLAN, clip=1e-12)
    model = adapted()
    train(model, ROWS, SETTINGS, pad=256, seed=0, penalty=squares, private=Private(tight, Randomness(0)))
    start, after = adapter_state(adapted()), adapter_state(model)
    name = next(name for name in start if ".lora_A." in name)
    assert after[name].norm() < start[name].norm()


def test_a_step_without_rows_is_noise_alone():
    found, done = trained(replace(PLAN, rows=10**9, batch=1, noise=1.0, clip=1.0))
    assert done.tokens == 0
    assert len(done.losses) == 3
    start = adapter_state(adapted())
    assert all(not value.equal(start[name]) for name, value in found.items())


def test_the_same_seed_gives_the_same_bits_and_none_never_does():
    plan = replace(PLAN, batch=3, noise=1.0, clip=1.0)
    first, second = (trained(plan, dropout=0.2)[0] for _ in range(2))
    assert all(value.equal(second[name]) for name, value in first.items())
    assert not close(trained(plan)[0], trained(plan, seed=1)[0])
    assert not close(trained(plan, seed=None)[0], trained(plan, seed=None)[0])


def test_dropout_cannot_be_foretold():
    """A known mask that moves when a row comes would let one row move all gradients."""
    assert not close(trained(dropout=0.5)[0], trained(dropout=0.5, seed=1)[0])


def test_the_noise_of_a_step_has_its_deviation():
    """Of one step of SGD-like gradients: what a parameter's gradient is without rows."""
    plan = replace(PLAN, rows=10**9, batch=1, noise=2.0, clip=0.25)
    model, seen = adapted(), []
    private = Private(plan, Randomness(0))
    with private.backward(model, lambda batches, count: 0.0) as backward:
        for _ in range(20):
            backward([], 0)
            seen.append(torch.cat([p.grad.flatten() for p in adapter_parameters(model).values()]))
    assert float(torch.cat(seen).std()) == pytest.approx(2.0 * 0.25, rel=0.01)


def test_a_row_without_a_finite_gradient_leaves_the_others_as_they_are():
    rows = [Encoded([n, n + 1, n + 2, n + 3], 1) for n in (10, 20, 30)]

    def poisoned(module, inputs, outputs):
        return torch.where((inputs[0] == 11)[..., None], outputs * float("inf"), outputs)

    found = []
    for taken in (rows, rows[1:]):
        model = adapted()
        model.get_base_model().get_input_embeddings().register_forward_hook(poisoned)
        private = Private(replace(PLAN, rows=len(taken), batch=len(taken)), Randomness(0))
        train(model, taken, SETTINGS, pad=256, seed=0, private=private)
        found.append(adapter_state(model))
    assert close(*found, atol=1e-4)  # Adam takes no notice that the one mean is of three rows


def test_what_became_no_number_is_told():
    with pytest.raises(DivergedError, match="no number any more"):
        trained(replace(PLAN, noise=1e30, clip=1e30), settings=replace(SETTINGS, learning_rate=1e38))


def test_a_budget_without_a_plan_is_refused():
    with pytest.raises(UsageError, match=r"\[train.privacy\] holds for the rounds"):
        train(adapted(), ROWS, replace(SETTINGS, privacy={"epsilon": 1.0}), pad=256, seed=0)
