import math

import pytest
import torch

from fedproxy.compression.heal_loss import divergence, hidden_distance, top_tokens


def logits(*shape: int, seed: int = 0, size: float = 3.0) -> torch.Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_top_tokens_by_hand() -> None:
    said = top_tokens(torch.tensor([[2 * math.log(1), 2 * math.log(5), 2 * math.log(2), 2 * math.log(2)]]), 2, 2.0)
    assert said.index[0, 0] == 1
    assert said.index[0, 1] in (2, 3)
    assert torch.allclose(said.log_p.exp(), torch.tensor([[0.5, 0.2]]))
    assert torch.allclose(said.rest.exp(), torch.tensor([0.3]))


def test_divergence_by_hand() -> None:
    teacher = top_tokens(torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log(), 1, 1.0)
    student = torch.tensor([[0.25, 0.25, 0.25, 0.25]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(divergence(teacher, student, 1.0)) == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_with_the_whole_vocabulary_it_is_the_full_divergence(temperature: float) -> None:
    teacher, student = logits(7, 11), logits(7, 11, seed=1)
    p, q = (torch.log_softmax(x.double() / temperature, dim=-1) for x in (teacher, student))
    expected = float((p.exp() * (p - q)).sum(dim=-1).mean())
    for k in (11, 50):
        said = top_tokens(teacher, k, temperature)
        assert said.index.shape == (7, 11)
        assert bool((said.rest == -math.inf).all())
        assert float(divergence(said, student, temperature)) == pytest.approx(expected, rel=1e-5)


def test_it_grows_with_the_tokens_kept_up_to_the_full_divergence() -> None:
    teacher, student = logits(50, 20), logits(50, 20, seed=1)
    found = [float(divergence(top_tokens(teacher, k, 1.0), student, 1.0)) for k in range(1, 21)]
    assert found == sorted(found)
    assert found[0] > 0


@pytest.mark.parametrize("k", [1, 4, 11])
def test_the_same_distribution_has_no_divergence_and_no_gradient(k: int) -> None:
    student = logits(5, 11).requires_grad_(True)
    found = divergence(top_tokens(student.detach() + 3.0, k, 2.0), student, 2.0)
    found.backward()
    assert float(found.detach()) == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("k", [2, 4])
def test_tokens_that_the_teacher_rules_out_do_no_harm(k: int) -> None:
    teacher = torch.tensor([[0.0, 1.0, -math.inf, -math.inf]])
    student = logits(1, 4).requires_grad_(True)
    found = divergence(top_tokens(teacher, k, 1.0), student, 1.0)
    found.backward()
    assert math.isfinite(float(found.detach()))
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_the_gradient_at_the_whole_vocabulary_is_q_minus_p() -> None:
    teacher, student = logits(1, 6), logits(1, 6, seed=1).requires_grad_(True)
    divergence(top_tokens(teacher, 6, 2.0), student, 2.0).backward()
    expected = (torch.softmax(student.detach() / 2, -1) - torch.softmax(teacher / 2, -1)) / 2
    assert student.grad is not None
    assert torch.allclose(student.grad, expected, atol=1e-6)


def test_bfloat16_logits_are_taken_in_float32() -> None:
    teacher, student = logits(9, 40).bfloat16(), logits(9, 40, seed=1).bfloat16()
    exact = divergence(top_tokens(teacher.float(), 8, 2.0), student.float(), 2.0)
    assert torch.equal(divergence(top_tokens(teacher, 8, 2.0), student, 2.0), exact)


def test_hidden_distance_by_hand() -> None:
    teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    student = torch.tensor([[3.0, 9.0], [0.0, 2.0], [7.0, 7.0]], requires_grad=True)
    found = hidden_distance(teacher, student)
    assert float(found.detach()) == pytest.approx((25 / 25 + 0 + 0) / 3)
    found.backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_hidden_distance_has_no_unit() -> None:
    teacher, student = logits(5, 8), logits(5, 8, seed=1)
    assert torch.allclose(hidden_distance(teacher, student), hidden_distance(64 * teacher, 64 * student))
