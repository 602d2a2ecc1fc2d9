import pytest
import torch

from fedproxy.models.lora import adapter_parameters, attach
from fedproxy.privacy.attacks.subject import Subject
from fedproxy.privacy.attacks.token_spans import (
    Options,
    figures,
    lookups,
    moved_rows,
    token_spans,
    vocabulary_residuals,
)
from fedproxy.privacy.measures.projection import row_space

LAYERS = {
    "llama": ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
    "gpt2": ["attn.c_attn"],
    "opt": ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
    "bloom": ["self_attention.query_key_value"],
}
LONGEST = 5


@pytest.mark.slow
def test_a_servers_settings_read_the_tokens_of_rows_off_an_update_and_usual_ones_do_not(learned_by_heart):
    found = token_spans(Subject(learned_by_heart), Options(), lambda *_: None)
    by_case = {(figure.where, figure.measure): figure for figure in found.figures}

    def of(case, measure="tokens found"):
        return by_case[case, measure]

    assert of("nearly linear, 1 row, 2 steps").value == 1.0
    assert of("nearly linear, 1 row, 2 steps", "right of those named").value == 1.0
    assert of("nearly linear, rank 256, 16 rows cut to 10 tokens, 2 steps").value > 0.9
    usual = of("the run's settings, whole round, 36 steps")
    assert usual.value < 0.1
    guessed = of("the run's settings, whole round, 36 steps", "right of as many guesses")
    assert guessed.value > 3 * guessed.chance


@pytest.mark.slow
def test_the_first_step_and_a_random_update_tell_nothing(learned_by_heart):
    subject = Subject(learned_by_heart)
    rows = subject.examples(subject.rows["bank"])[:4]
    model = subject.before_training()
    layers, places = lookups(model, list(subject.start), 48)
    first = moved_rows(subject.update("bank", rows, {"max_steps": 1}).update, layers)
    assert not first.any()
    found = dict.fromkeys(("tokens found", "right of as many guesses"), 0.0)
    for seed in range(20):
        drawn = torch.randn(first.shape, generator=torch.Generator().manual_seed(seed))
        for figure in figures("", vocabulary_residuals(model, layers[0], places, row_space(drawn)), rows, ""):
            if figure.measure in found:
                found[figure.measure] += figure.value / 20
                chance = figure.chance
    assert found["tokens found"] == 0.0
    assert found["right of as many guesses"] < 2 * chance


@pytest.mark.parametrize("family", LAYERS)
def test_the_tokens_of_a_gradient_lie_in_its_span_in_each_family(tiny_model, family):
    model = attach(tiny_model(family), r=8, alpha=16, dropout=0.0, seed=0)
    parameters = adapter_parameters(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters.items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    layers, places = lookups(model, list(parameters), LONGEST)
    assert (sorted(layers), places) == (LAYERS[family], 1 if family in ("llama", "bloom") else LONGEST)
    ids = torch.tensor([[7, 40, 3, 21, 11]])
    model(input_ids=ids, labels=ids).loss.backward()
    moved = moved_rows({name: parameter.grad for name, parameter in parameters.items()}, layers)
    left = vocabulary_residuals(model, layers[0], places, row_space(moved))
    assert left[[7, 40, 3, 21]].max() < 1e-2
    assert left.median() > 0.1


def test_an_adapter_without_a_layer_that_looks_tokens_up_is_said_to_have_none(tiny_model):
    model = attach(tiny_model("llama"), r=4, alpha=8, dropout=0.0, targets=["down_proj"], seed=0)
    assert lookups(model, list(adapter_parameters(model)), LONGEST)[0] == []
    model = attach(tiny_model("llama"), r=4, alpha=8, dropout=0.0, layers=[1], seed=0)
    assert lookups(model, list(adapter_parameters(model)), LONGEST) == ([], 0)
