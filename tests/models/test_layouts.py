import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from fedproxy.models.encoding import Encoded
from fedproxy.models.label_loss import summed_loss
from fedproxy.models.layouts import IGNORED, Layout, collate, first_fit, keeps_apart, layout_for, pack
from fedproxy.models.lora import adapter_parameters, attach
from tests.conftest import FAMILIES, MULTIMODAL, make_model

PAD = 256
LENGTHS = (19, 11, 7, 2, 8, 3)
"""Longer than the sliding windows of 8, of just that length, and shorter; in three rows, one of them filled up."""
MIXING = ["opt", "bloom"]
"""OPT knows positions, but does not tell them to what makes its mask; Bloom reads them off the mask."""
APART = [family for family in FAMILIES if family not in MIXING]


def examples(lengths: Sequence[int] = LENGTHS) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    return [Encoded(torch.randint(256, (n,), generator=generator).tolist(), max(1, n // 2)) for n in lengths]


def adapted(family: str) -> Any:
    """A model whose adapter does something: B is not zero."""
    model = attach(make_model(family), r=2, alpha=4, dropout=0.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(adapter_parameters(model).items()):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def test_collate_pads_and_masks() -> None:
    batch = collate([Encoded([5, 6, 7], 1), Encoded([8, 9], 1)], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]


def test_packing_by_hand() -> None:
    batch = pack([Encoded([5, 6], 1), Encoded([1, 2, 3, 4, 5, 6], 4), Encoded([7, 8, 9], 2)], 0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 5, 6, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED] * 4 + [5, 6], [IGNORED, IGNORED, 9, IGNORED, 6, IGNORED]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_first_fit_packs_everything_once_and_tightly(lengths: list[int]) -> None:
    rows, capacity = first_fit(lengths), max(lengths)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    fewest = -(-sum(lengths) // capacity)
    assert len(rows) <= len(lengths)
    assert sum(sum(lengths[i] for i in row) <= capacity / 2 for row in rows) <= 1
    assert len(rows) <= 2 * fewest


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(2, 30), st.integers(1, 29)), min_size=1, max_size=12))
def test_both_layouts_hold_the_same_tokens_and_labels(shapes: list[tuple[int, int]]) -> None:
    made = [Encoded(list(range(100 * i, 100 * i + n)), min(start, n - 1)) for i, (n, start) in enumerate(shapes)]
    batch = pack(made, -1)
    padded = collate(made, -1)
    assert batch["input_ids"].shape[1] == padded["input_ids"].shape[1]
    for name in ("input_ids", "labels"):
        left, right = (sorted(t[name][t[name] >= 0].tolist()) for t in (batch, padded))
        assert left == right
    real = batch["input_ids"] >= 0
    assert torch.equal(batch["position_ids"][real], batch["input_ids"][real] % 100)


def loss_and_gradients(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, list[Any]]:
    total = sum((summed_loss(model, batch) for batch in batches), torch.zeros(()))
    return total.detach(), list(torch.autograd.grad(total, list(adapter_parameters(model).values())))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", APART)
def test_packed_sequences_are_as_if_alone(family: str, attention: str) -> None:
    """Loss and gradients of packed sequences are those of each sequence in a batch of its own."""
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("capped attention scores are eager only")
    model = adapted(family)
    model.get_base_model().set_attn_implementation(attention)
    assert keeps_apart(model)
    loss, gradients = loss_and_gradients(model, [pack(examples(), PAD)])
    expected, wanted = loss_and_gradients(model, [collate([example], PAD) for example in examples()])
    assert torch.allclose(loss, expected, rtol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert torch.allclose(gradient, want, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("family", MIXING)
def test_a_family_that_mixes_packed_sequences_is_padded(family: str) -> None:
    model = adapted(family)
    assert layout_for(model, padding_free=True) is collate
    packed, padded = (loss_and_gradients(model, [layout(examples(), PAD)])[0] for layout in (pack, collate))
    assert not torch.allclose(packed, padded, rtol=1e-4)


@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
def test_exploded_weights_say_nothing_of_the_model(value: float, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = adapted("llama")
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.fill_(value)
    assert keeps_apart(model) is None
    assert layout_for(model, padding_free=True) is collate
    assert not caplog.text


@pytest.mark.parametrize("family", APART)
def test_packed_logits_are_those_of_each_sequence_alone(family: str) -> None:
    model = adapted(family)
    batch = pack(examples(), PAD)
    order = [i for row in first_fit(LENGTHS) for i in row]
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(input_ids=torch.tensor([examples()[i].ids]), use_cache=False).logits[0] for i in order]
    inside = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    inside[-1, -(inside.numel() - sum(LENGTHS)) :] = False
    assert torch.allclose(logits[inside], torch.cat(alone), atol=1e-4)


@pytest.mark.parametrize("family", MULTIMODAL)
def test_text_decoders_of_other_models_are_tried_too(family: str) -> None:
    model = attach(make_model(family), r=2, alpha=4, dropout=0.0, seed=0)
    assert layout_for(model, padding_free=True) is pack


def other(kind: str, **settings: Any) -> Any:
    config = AutoConfig.for_model(kind, vocab_size=64, hidden_size=16, **settings)
    return attach(AutoModelForCausalLM.from_config(config), r=2, alpha=4, dropout=0.0, seed=0)


def test_a_model_without_positions_is_padded() -> None:
    model = other("bloom", n_layer=2, n_head=2)
    assert layout_for(model, padding_free=True) is collate


def test_a_model_that_overlooks_where_sequences_start_is_padded() -> None:
    model = adapted("llama")
    inner = model.get_base_model().model.forward
    model.get_base_model().model.forward = lambda *args, **kwargs: inner(*args, **{**kwargs, "position_ids": None})
    assert layout_for(model, padding_free=True) is collate


def test_padding_free_can_be_turned_off() -> None:
    layout: Layout = layout_for(adapted("llama"), padding_free=False)
    assert layout is collate


@pytest.mark.parametrize("training", [True, False])
def test_trying_changes_neither_state_nor_randomness(training: bool) -> None:
    model = adapted("gpt2")
    model.train(training)
    before = torch.get_rng_state()
    keeps_apart(model)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_not_mistaken_for_mixing(family: str, dtype: torch.dtype) -> None:
    model = attach(make_model(family, dtype=dtype), r=2, alpha=4, dropout=0.0, seed=0)
    assert keeps_apart(model) is (family in APART)
