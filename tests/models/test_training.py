import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedproxy.config import Train
from fedproxy.models.encoding import Encoded, encode
from fedproxy.models.layouts import IGNORED, collate
from fedproxy.models.lora import adapter_parameters, adapter_state, attach, set_adapter_state
from fedproxy.models.training import DivergedError, batches, optimizer_steps, step_batches, train, trained_tokens
from tests.conftest import make_model, make_tokenizer

TOKENIZER = make_tokenizer()
ROWS = [{"prompt": f"say {word}:", "completion": f" {word}"} for word in ("yes", "no", "perhaps", "never", "always")]
SETTINGS = Train(epochs=2, batch_size=2, learning_rate=1e-2, lora_dropout=0.0, precision="fp32")


def adapted(seed=0, dropout=0.0):
    return attach(make_model(num_hidden_layers=2), r=2, alpha=4, dropout=dropout, seed=seed)


@pytest.mark.parametrize("grouped", [True, False])
def test_batches_hold_every_example_once(grouped):
    examples = [Encoded([1] * n, 1) for n in range(2, 39)]
    cut = batches(examples, 4, group_by_length=grouped, generator=torch.Generator().manual_seed(0))
    assert sorted(i for batch in cut for i in batch) == list(range(37))
    assert max(len(batch) for batch in cut) == 4
    if grouped:
        assert max(abs(a - b) for batch in cut for a in batch for b in batch) <= 4


def test_step_counts():
    assert optimizer_steps(33, Train(batch_size=16)) == 3
    assert optimizer_steps(33, Train(batch_size=16, gradient_accumulation_steps=2, epochs=2)) == 4
    assert optimizer_steps(33, Train(batch_size=16, epochs=0.1)) == 1
    assert optimizer_steps(33, Train(batch_size=16, max_steps=2)) == 2


def bare_loop(model, examples, order, settings, penalty=None):
    """The oracle: full logits, cross-entropy by labels, torch's plain AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    for batch in order:
        padded = collate([examples[i] for i in batch], 256)
        logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), padded["labels"][:, 1:].flatten(), ignore_index=IGNORED)
        (loss + (penalty() if penalty else 0)).backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return adapter_state(model)


def test_it_trains_as_a_bare_loop_does():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    model = adapted()
    seen = []
    done = train(model, examples, SETTINGS, pad=256, seed=1, on_step=lambda *step: seen.append(step))
    assert len(done.losses) == len(seen) == 6
    assert done.tokens == 2 * sum(len(e.ids) for e in examples)
    from fedproxy.seeds import derive_seed

    generator = torch.Generator().manual_seed(derive_seed(1, "batches"))
    order = []
    for _ in range(2):
        order += reversed(batches(examples, 2, group_by_length=True, generator=generator))
    expected = bare_loop(adapted(), examples, order, SETTINGS)
    assert all(torch.allclose(value, expected[name], atol=1e-5) for name, value in adapter_state(model).items())


def test_accumulated_batches_weigh_every_token_alike():
    examples = encode(ROWS[:4], TOKENIZER, max_length=32)
    whole, parts = adapted(), adapted()
    train(whole, examples, Train(batch_size=4, learning_rate=1e-2, precision="fp32"), pad=256, seed=0)
    settings = Train(batch_size=1, gradient_accumulation_steps=4, learning_rate=1e-2, precision="fp32")
    train(parts, examples, settings, pad=256, seed=0)
    assert all(torch.allclose(v, adapter_state(parts)[n], atol=1e-6) for n, v in adapter_state(whole).items())


def test_checkpointing_changes_no_result():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    plain, checkpointed = adapted(), adapted()
    train(plain, examples, SETTINGS, pad=256, seed=0)
    train(checkpointed, examples, Train(**{**vars(SETTINGS), "gradient_checkpointing": True}), pad=256, seed=0)
    assert all(torch.allclose(v, adapter_state(checkpointed)[n], atol=1e-6) for n, v in adapter_state(plain).items())


def test_padding_changes_no_result():
    examples = encode([*ROWS, {"prompt": "a", "completion": "b"}], TOKENIZER, max_length=32)
    settings = replace(SETTINGS, batch_size=4, group_by_length=False)
    packed, padded = adapted(), adapted()
    done = [
        train(model, examples, replace(settings, padding_free=free), pad=256, seed=0)
        for model, free in ((packed, True), (padded, False))
    ]
    assert done[0].losses == pytest.approx(done[1].losses, rel=1e-5)
    assert done[0].tokens == done[1].tokens
    assert all(torch.allclose(v, adapter_state(padded)[n], atol=1e-5) for n, v in adapter_state(packed).items())


def test_the_learning_rates_are_summed_up():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    settings = replace(SETTINGS, lr_scheduler_type="linear", learning_rate=0.25)
    assert train(adapted(), examples, SETTINGS, pad=256, seed=0, steps=3).rate_sum == pytest.approx(0.03)
    assert train(adapted(), examples, settings, pad=256, seed=0, steps=4).rate_sum == pytest.approx(
        0.25 * (1 + 0.75 + 0.5 + 0.25)
    )


def test_a_constant_rate_is_warmed_up_too_and_otherwise_is_constant_to_the_bit():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    warmed = replace(SETTINGS, warmup_steps=2, learning_rate=0.25)
    assert train(adapted(), examples, warmed, pad=256, seed=0, steps=4).rate_sum == 0.25 * (0 + 0.5 + 1 + 1)
    assert train(adapted(), examples, replace(warmed, warmup_steps=0), pad=256, seed=0, steps=4).rate_sum == 1.0


def test_drift_is_taken_away_after_every_step_with_its_rate():
    """One step after which nothing depends on the drift but the parameters themselves: they differ by η·drift."""
    examples = encode(ROWS, TOKENIZER, max_length=32)
    plain, drifted = adapted(), adapted()
    drift = {name: torch.full_like(value, 0.5) for name, value in adapter_state(plain).items()}
    train(plain, examples, SETTINGS, pad=256, seed=0, steps=1)
    train(drifted, examples, SETTINGS, pad=256, seed=0, steps=1, drift=drift)
    for name, value in adapter_state(plain).items():
        assert torch.allclose(adapter_state(drifted)[name], value - 1e-2 * 0.5, atol=1e-7)


def test_a_drift_of_zero_changes_nothing():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    plain, drifted = adapted(), adapted()
    drift = {name: torch.zeros_like(value) for name, value in adapter_state(plain).items()}
    train(plain, examples, SETTINGS, pad=256, seed=0)
    train(drifted, examples, SETTINGS, pad=256, seed=0, drift=drift)
    assert all(torch.equal(v, adapter_state(drifted)[n]) for n, v in adapter_state(plain).items())


def test_only_what_requires_gradients_is_trained():
    """As with A frozen: it stays, B moves, and penalty and drift need know nothing of A."""
    examples = encode(ROWS, TOKENIZER, max_length=32)
    model = adapted()
    for name, parameter in adapter_parameters(model).items():
        parameter.requires_grad_(".lora_B." in name)
    before = adapter_state(model)
    seen = set()

    def penalty(parameters):
        seen.update(parameters)
        return sum(parameter.square().sum() for parameter in parameters.values())

    drift = {name: torch.ones_like(value) for name, value in before.items() if ".lora_B." in name}
    train(model, examples, SETTINGS, pad=256, seed=0, penalty=penalty, drift=drift)
    assert seen == drift.keys()
    assert all(torch.equal(v, before[n]) is (".lora_A." in n) for n, v in adapter_state(model).items())


def test_memory_and_speed_are_told():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    done = train(adapted(), examples, SETTINGS, pad=256, seed=0)
    assert done.seconds > 0
    assert done.peak_memory > sum(p.numel() * p.element_size() for p in adapted().parameters())


def test_same_seed_same_bits_and_the_global_state_is_untouched():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    model = adapted(dropout=0.3)
    start = adapter_state(model)
    results = []
    for seed in (1, 1, 2):
        set_adapter_state(model, start)
        torch.manual_seed(seed * 77)
        before = torch.get_rng_state()
        train(model, examples, SETTINGS, pad=256, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(adapter_state(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in start)
    assert not all(torch.equal(results[0][name], results[2][name]) for name in start)


def test_the_base_is_frozen_and_the_loss_falls():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    model = adapted()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    done = train(model, examples, SETTINGS, pad=256, seed=0, steps=30)
    assert sum(done.losses[-3:]) < sum(done.losses[:3])
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_a_strong_penalty_holds_the_parameters_at_the_anchor():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    free, held = adapted(), adapted()
    anchor = adapter_state(held)

    def penalty(parameters):
        return 1e4 * sum(((p - anchor[name]) ** 2).sum() for name, p in parameters.items())

    settings = Train(**{**vars(SETTINGS), "max_grad_norm": 1e9})
    train(free, examples, settings, pad=256, seed=0, steps=20)
    train(held, examples, settings, pad=256, seed=0, steps=20, penalty=penalty)
    moved = [sum(float((v - anchor[n]).norm()) for n, v in adapter_state(m).items()) for m in (free, held)]
    assert moved[1] < moved[0] / 2


def test_a_diverging_loss_is_an_error_that_says_what_to_do():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    model = adapted()
    state = adapter_state(model)
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(math.nan)
    with pytest.raises(DivergedError, match="Lower learning_rate"):
        train(model, examples, SETTINGS, pad=256, seed=0)
    assert all(torch.equal(v, state[n]) for n, v in adapter_state(model).items())


def test_a_training_that_failed_leaves_nothing_to_the_next():
    examples = encode(ROWS, TOKENIZER, max_length=32)
    model, fresh = adapted(), adapted()
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(math.nan)
    with pytest.raises(DivergedError):
        train(model, examples, SETTINGS, pad=256, seed=0)
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(1.0)
    for each in (model, fresh):
        train(each, examples, SETTINGS, pad=256, seed=0)
    assert all(torch.equal(v, adapter_state(fresh)[n]) for n, v in adapter_state(model).items())


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=23),
    epochs=st.floats(0.1, 4.0),
    size=st.integers(1, 5),
    together=st.integers(1, 3),
    most=st.none() | st.integers(1, 9),
    by_length=st.booleans(),
)
def test_tokens_are_counted_without_training(lengths, epochs, size, together, most, by_length):
    examples = [Encoded([5] * length, 1) for length in lengths]
    how = Train(
        epochs=epochs,
        batch_size=size,
        gradient_accumulation_steps=together,
        max_steps=most,
        group_by_length=by_length,
    )
    steps = itertools.islice(step_batches(examples, how, 3), optimizer_steps(len(examples), how))
    tokens = sum(len(example.ids) for step in steps for batch in step for example in batch)
    assert trained_tokens(examples, how, 3) == tokens
