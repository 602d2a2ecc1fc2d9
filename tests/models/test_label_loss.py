from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fedproxy.models.encoding import Encoded
from fedproxy.models.label_loss import head_only_at, summed_loss
from fedproxy.models.layouts import IGNORED, collate
from fedproxy.models.lora import adapter_parameters, attach
from tests.conftest import FAMILIES, make_model

BATCH = collate([Encoded([5, 6, 7, 8, 9], 3), Encoded([8, 9, 20], 1), Encoded([3, 4], 1)], 256)


def adapted(family: str, **changes: Any) -> Any:
    return attach(make_model(family, **changes), r=2, alpha=4, dropout=0.0, seed=0)


def whole(model: Any) -> torch.Tensor:
    """The oracle: logits of every position."""
    logits = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits[:, :-1]
    labels = BATCH["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def learned(loss: Callable[[Any], torch.Tensor], model: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Loss and gradients, always with the same dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = loss(model)
        return found, torch.autograd.grad(found, list(adapter_parameters(model).values()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_logits(family: str, checkpointing: bool) -> None:
    model = adapted(family).train()
    expected, wanted = learned(whole, model)
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    loss, gradients = learned(lambda changed: summed_loss(changed, BATCH), model)
    assert torch.allclose(loss, expected, rtol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert torch.allclose(gradient, want, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("family", "setting"), [("gemma2", {"final_logit_softcapping": 2.0}), ("granite", {"logits_scaling": 3.0})]
)
def test_what_a_family_does_to_logits_is_kept(family: str, setting: dict[str, float]) -> None:
    plain, changed = adapted(family), adapted(family, **setting)
    assert not torch.allclose(summed_loss(plain, BATCH), summed_loss(changed, BATCH), rtol=1e-3)
    assert torch.allclose(summed_loss(changed, BATCH), whole(changed), rtol=1e-5)


def test_the_head_sees_only_what_predicts_a_label() -> None:
    model = adapted("llama")
    seen: list[torch.Size] = []
    model.get_base_model().lm_head.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape))
    summed_loss(model, BATCH)
    assert seen == [(1, 5, 32)]


def test_the_head_is_itself_again_afterwards() -> None:
    head = torch.nn.Linear(2, 3)
    with pytest.raises(ZeroDivisionError), head_only_at(head, torch.tensor([[True, False]])):
        assert head(torch.ones(1, 2, 2)).shape == (1, 1, 3)
        raise ZeroDivisionError
    assert head(torch.ones(1, 2, 2)).shape == (1, 2, 3)


def test_a_head_that_is_not_called_as_a_module() -> None:
    model = adapted("llama")
    expected = whole(model)
    base = model.get_base_model()
    base.get_output_embeddings = lambda: None
    assert torch.allclose(summed_loss(model, BATCH), expected, rtol=1e-5)
    base.get_output_embeddings = lambda: torch.nn.Linear(32, 260)
    assert torch.allclose(summed_loss(model, BATCH), expected, rtol=1e-5)
