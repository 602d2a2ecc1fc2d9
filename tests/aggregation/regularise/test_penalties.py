import pytest
import torch

from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.errors import ArtifactError, UsageError

ANCHOR = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.0]])}
CONFLICT = {"a": torch.tensor([0.5, 1.0]), "b": torch.tensor([[0.0]])}
PENALTIES = [name for name, row in REGULARISERS.items() if row.penalty]


def penalty(name):
    return REGULARISERS.choose(name).penalty


def parameters(dtype=torch.float32):
    given = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[4.0]])}
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in given.items()}


def test_pcr_by_hand_eq_8_and_9():
    # 0.1 · (0.5 · 2² + 1 · 1² + 0 · 4²) = 0.3; gradient 2 λ C (φ - φ_t).
    given = parameters()
    value = penalty("pcr")(given, ANCHOR, CONFLICT, 0.1)
    assert value.item() == pytest.approx(0.3)
    value.backward()
    assert given["a"].grad.tolist() == pytest.approx([0.2, -0.2])
    assert given["b"].grad.tolist() == [[0.0]]


def test_fedprox_by_hand():
    # 0.1 / 2 · (2² + 1² + 4²) = 1.05; gradient μ (φ - φ_t).
    given = parameters()
    value = penalty("fedprox")(given, ANCHOR, None, 0.1)
    assert value.item() == pytest.approx(1.05)
    value.backward()
    assert given["a"].grad.tolist() == pytest.approx([0.2, -0.1])
    assert given["b"].grad.tolist() == [[pytest.approx(0.4)]]


def test_the_first_round_has_no_conflict_and_no_pcr():
    assert penalty("pcr")(parameters(), ANCHOR, None, 1.0).item() == 0.0


def test_none_adds_nothing():
    assert REGULARISERS["none"].term(ANCHOR, CONFLICT, 1.0, torch.device("cpu")) is None


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_penalty_is_a_float32_scalar_and_zero_at_the_anchor(name, dtype):
    at_anchor = {key: tensor.to(dtype) for key, tensor in ANCHOR.items()}
    value = penalty(name)(at_anchor, ANCHOR, CONFLICT, 1.0)
    assert (value.shape, value.dtype, value.item()) == ((), torch.float32, 0.0)


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_can_be_added_to_a_loss_and_leaves_the_anchor_alone(name):
    given = parameters()
    anchor = {key: tensor.clone().requires_grad_() for key, tensor in ANCHOR.items()}
    loss = sum(tensor.sum() for tensor in given.values()) + penalty(name)(given, anchor, CONFLICT, 0.1)
    loss.backward()
    assert all(tensor.grad is not None for tensor in given.values())
    assert all(tensor.grad is None for tensor in anchor.values())


@pytest.mark.parametrize("name", ["fedprox", "pcr"])
def test_an_anchor_of_another_layout_is_refused(name):
    with pytest.raises(ArtifactError, match="anchor holds no tensor b"):
        penalty(name)(parameters(), {"a": ANCHOR["a"]}, CONFLICT, 1.0)
    with pytest.raises(ArtifactError, match=r"anchor holds no tensor b of shape \[1, 1\]"):
        penalty(name)(parameters(), {**ANCHOR, "b": torch.zeros(2)}, CONFLICT, 1.0)


def test_a_conflict_of_another_layout_is_refused():
    with pytest.raises(ArtifactError, match="conflict holds no tensor a"):
        penalty("pcr")(parameters(), ANCHOR, {"b": CONFLICT["b"]}, 1.0)


def test_an_unknown_regulariser_is_explained():
    with pytest.raises(UsageError, match="Did you mean 'fedprox'"):
        penalty("fedprx")
