import copy

import pytest
import torch
from torch import nn

from fedproxy.models import lora
from fedproxy.models.lora_layer import in_few_passes, keep_mask, masked
from tests.conftest import FAMILIES, VOCABULARY, make_model

IDS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


def adapted(family="llama"):
    model = lora.attach(make_model(family), r=4, alpha=12, dropout=0.0, seed=3).eval()  # GPT-2 has dropout of its own
    generator = torch.Generator().manual_seed(1)
    noise = {name: torch.randn(t.shape, generator=generator) / 10 for name, t in lora.adapter_state(model).items()}
    lora.set_adapter_state(model, noise)
    return model


def outcome(model, autocast=False):
    """The logits, and the adapter's gradients by name."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(IDS, use_cache=False).logits.float()
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in lora.adapter_parameters(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_logits_and_gradients_are_pefts(family):
    model = adapted(family)
    logits, gradients = outcome(model)
    with in_few_passes(model, torch.float32, once=True):
        found, found_gradients = outcome(model)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("once", [True, False])
def test_in_bfloat16_they_are_pefts_up_to_its_rounding(once):
    model = adapted()
    exact, _ = outcome(model)
    logits, gradients = outcome(model, autocast=True)
    with in_few_passes(model, torch.bfloat16, once=once):
        found, found_gradients = outcome(model, autocast=True)
    assert (found - exact).norm() < 1.5 * (logits - exact).norm()
    for name, gradient in gradients.items():
        assert torch.cosine_similarity(found_gradients[name].flatten(), gradient.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("autocast", [True, False])
def test_where_autocast_is_not_as_announced_a_layer_computes_as_peft_does(autocast):
    model = adapted()
    expected, _ = outcome(model, autocast=autocast)
    with in_few_passes(model, torch.float32 if autocast else torch.bfloat16, once=True):
        assert torch.equal(outcome(model, autocast=autocast)[0], expected)


def test_afterwards_the_layers_are_pefts_again():
    model = adapted()
    expected, _ = outcome(model)
    with pytest.raises(RuntimeError), in_few_passes(model, torch.float32, once=True):
        raise RuntimeError
    assert torch.equal(outcome(model)[0], expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_dropout_drops_inputs_of_a_and_scales_the_rest_by_hand():
    model = lora.attach(make_model(), r=4, alpha=12, dropout=0.25, targets=["q_proj", "k_proj"], seed=3).train()
    layer = model.get_base_model().model.layers[0].self_attn
    nn.init.normal_(layer.q_proj.lora_B["default"].weight)
    nn.init.normal_(layer.k_proj.lora_B["default"].weight)
    x = torch.randn(5, 32, requires_grad=True)
    torch.manual_seed(11)
    kept = keep_mask(x.shape, 0.25).float()
    with in_few_passes(model, torch.float32, once=True):
        torch.manual_seed(11)
        for linear in (layer.q_proj, layer.k_proj):  # both read x, so both have the mask that was drawn first
            a, b = (copy.deepcopy(part["default"].weight) for part in (linear.lora_A, linear.lora_B))
            expected = linear.base_layer(x) + 12 / 4 / 0.75 * (x * kept) @ a.t() @ b.t()
            found = linear(x)
            torch.testing.assert_close(found, expected)
            for left, right in zip(
                torch.autograd.grad(
                    found.square().sum(), [x, *linear.lora_A.parameters(), *linear.lora_B.parameters()]
                ),
                torch.autograd.grad(expected.square().sum(), [x, a, b]),
                strict=True,
            ):
                torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_an_input_that_was_changed_in_place_is_read_anew():
    model = adapted()
    linear = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(5, 32)
    with in_few_passes(model, torch.float32, once=True):
        before = linear(x)
        x.mul_(2)
        torch.testing.assert_close(linear(x), 2 * before)


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.5])
def test_the_mask_drops_the_share_that_was_asked_for_and_the_same_for_the_same_seed(dropout):
    shape = torch.Size([400, 1001])
    torch.manual_seed(3)
    mask = keep_mask(shape, dropout)
    again = keep_mask(shape, dropout)
    torch.manual_seed(3)
    assert torch.equal(keep_mask(shape, dropout), mask)
    assert set(mask.unique().tolist()) == {0, 1}
    for one in (mask, again):
        assert abs(1 - float(one.float().mean()) - dropout) < 4 * (dropout * (1 - dropout) / one.numel()) ** 0.5 + 1e-5
    together = float(((1 - mask) * (1 - again)).float().mean())
    assert abs(together - dropout**2) < 5 * dropout / mask.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_masked_is_zero_and_the_rest_keeps_its_bits(dtype):
    values = torch.tensor([1.5, -2.25, float("inf"), -0.0, 3e-39, 7.0], dtype=dtype)
    mask = torch.tensor([1, 0, 1, 1, 1, 0], dtype=torch.int16)
    found = masked(values, mask)
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(found.view(bits), torch.where(mask == 1, values.view(bits), 0))
