"""Gradients of rows that share a batch, against a loop over single rows that knows nothing of them."""

from functools import partial

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from fedproxy.errors import UsageError
from fedproxy.models.encoding import Encoded
from fedproxy.models.label_loss import row_means, summed_loss
from fedproxy.models.layouts import IGNORED, collate
from fedproxy.models.lora import adapter_parameters, attach, train_only
from fedproxy.models.row_gradients import check_rows_apart, rows_apart
from tests.conftest import FAMILIES, MULTIMODAL, make_model

ROWS = [
    Encoded([257, *range(10, 23), 258], 4),
    Encoded([257, 65, 66, 67, 258], 2),
    Encoded([257, *range(40, 49)], 1, gaps=((3, 6),)),
]


def adapted(family="llama", dropout=0.0, **changes):
    """A model with an adapter of which nothing is zero."""
    model = attach(make_model(family, **changes), r=2, alpha=4, dropout=dropout, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def one_by_one(model, rows=ROWS):
    """The oracle: each row alone, full logits, its mean cross-entropy, autograd."""
    parameters = {name: p for name, p in adapter_parameters(model).items() if p.requires_grad}
    found = []
    for row in rows:
        batch = collate([row], 256)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found.append(dict(zip(parameters, gradients, strict=True)))
    return found


def batched(model, rows=ROWS):
    with rows_apart(model) as found:
        found.rows = len(rows)
        row_means(model, collate(rows, 256)).backward()
        return found.take()


@pytest.mark.parametrize("family", [*FAMILIES, *MULTIMODAL])
def test_each_row_has_the_gradient_that_it_has_alone(family):
    model = adapted(family)
    expected, gradients = one_by_one(model), batched(model)
    assert gradients
    for number, alone in enumerate(expected):
        for name, gradient in alone.items():
            found = gradients[name][number] if name in gradients else torch.zeros_like(adapter_parameters(model)[name])
            assert torch.allclose(found, torch.zeros(()) if gradient is None else gradient, atol=1e-5), name
    assert all(parameter.grad is None for parameter in adapter_parameters(model).values())


@pytest.mark.parametrize("family", [*FAMILIES, *MULTIMODAL])
def test_the_probe_lets_every_family_pass_and_changes_nothing(family):
    model = adapted(family).train()
    before = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    with rows_apart(model) as found:
        reached = check_rows_apart(model, found)
    assert reached == sorted(name for name in before if "vision" not in name)
    assert model.training
    assert all(parameter.equal(before[name]) for name, parameter in adapter_parameters(model).items())


def test_afterwards_the_model_is_what_it_was():
    model, plain = adapted(), adapted()
    batched(model)
    for one in (model, plain):
        summed_loss(one, collate(ROWS, 256)).backward()
    expected = adapter_parameters(plain)
    assert all(p.grad.equal(expected[name].grad) for name, p in adapter_parameters(model).items())


def test_checkpointed_blocks_have_the_same_gradients():
    plain, checkpointed = adapted().train(), adapted().train()
    checkpointed.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    expected, found = batched(plain), batched(checkpointed)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[name], gradient, atol=1e-6) for name, gradient in expected.items())


def test_what_is_frozen_has_none():
    model = adapted()
    train_only(model, lambda name: ".lora_B." in name)
    found, expected = batched(model), one_by_one(model)
    assert found
    assert all(".lora_B." in name for name in found)
    assert all(torch.allclose(found[name][0], gradient, atol=1e-5) for name, gradient in expected[0].items())


def test_a_layer_that_is_called_twice_adds_up():
    model = adapted(num_hidden_layers=2)
    layers = model.get_base_model().model.layers
    layers[1] = layers[0]
    for number, alone in enumerate(one_by_one(model)):
        for name, gradient in alone.items():
            assert torch.allclose(batched(model)[name][number], gradient, atol=1e-5)


def test_the_weights_of_the_rows_are_their_means():
    model = adapted(num_hidden_layers=1)
    alone = [summed_loss(model, collate([row], 256)).item() / row.counting for row in ROWS]
    assert row_means(model, collate(ROWS, 256)).item() == pytest.approx(sum(alone), rel=1e-5)


def test_layers_that_were_made_faster_compute_as_they_did_before_for_as_long():
    """One that calls A and B not as layers would leave no gradient of any row."""
    model, plain = adapted(num_hidden_layers=2), adapted(num_hidden_layers=2)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]

    def faster(layer, x):
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        return layer.base_layer(x) + layer.scaling["default"] * (x @ a.t() @ b.t())

    for layer in layers:
        layer.forward = partial(faster, layer)
    found, expected = batched(model), batched(plain)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], gradient, atol=1e-6) for name, gradient in expected.items())
    assert all(layer.forward.func is faster for layer in layers)


def test_a_parameter_without_any_row_is_found_out():
    model = adapted(num_hidden_layers=2)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    with rows_apart(model) as found:
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        layer.forward = lambda x: layer.base_layer(x) + x @ a.t() @ b.t()
        with pytest.raises(UsageError, match="the gradient of each row by itself"):
            check_rows_apart(model, found)


@pytest.mark.parametrize("how", ["mixes rows", "turns the batch round"])
def test_a_model_that_mixes_rows_is_refused(how):
    model = adapted(num_hidden_layers=2)
    layer = model.get_base_model().model.layers[0].mlp.up_proj

    def turned(module, inputs):
        return (inputs[0].flip(0),)

    def mixed(module, inputs, outputs):
        return outputs + 0.1 * outputs.mean(0, keepdim=True)

    if how == "mixes rows":
        layer.register_forward_hook(mixed)
    else:
        layer.lora_A.default.register_forward_pre_hook(turned)
    with rows_apart(model) as found, pytest.raises(UsageError, match="LlamaForCausalLM mixes the rows"):
        check_rows_apart(model, found)
