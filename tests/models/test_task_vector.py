import pytest
import torch

from fedproxy.models.task_vector import LowRank, changed, changes, row_slices

P = "base_model.model.model.layers."


def test_equation_15_by_hand() -> None:
    """W + (alpha / r) B A with r = 2 and alpha = 4."""
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    a = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
    b = torch.tensor([[1.0, 1.0], [0.5, -2.0]])
    expected = torch.tensor([[3.0, 4.0, 5.0], [5.0, 1.0, 12.0]])
    assert torch.equal(changed(weight, LowRank(a, b, 2.0)), expected)
    assert torch.equal(changed(weight.T, LowRank(a, b, 2.0, transposed=True)), expected.T)


def test_the_sum_is_made_in_float32_and_rounded_once() -> None:
    weight = torch.tensor([[1.0]], dtype=torch.bfloat16)
    a, b = torch.tensor([[1.0 + 2**-10]]), torch.tensor([[2.0**-8]])
    assert changed(weight, LowRank(a, b, 1.0)).item() == 1.0 + 2**-7
    assert changed(weight, LowRank(a, b * 0.99, 1.0)).item() == 1.0
    assert changed(weight, LowRank(a, b, 1.0)).dtype == torch.bfloat16


def test_a_zero_task_vector_is_the_weight_itself() -> None:
    weight = torch.tensor([[-0.0, 1.0]])
    assert changed(weight, LowRank(torch.ones(1, 2), torch.zeros(1, 1), 3.0)) is weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("outputs", "inputs", "rank"),
    [(300, 4096, 8), (257, 2048, 32), (1, 70, 2), (129, 4095, 16), (2049, 1023, 3), (5000, 130, 64), (1025, 512, 1)],
)
def test_in_pieces_as_at_once_to_the_bit(
    outputs: int, inputs: int, rank: int, transposed: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, inputs, generator=generator), 0.01 * torch.randn(outputs, rank, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    if transposed:
        weight = weight.T.contiguous()
    delta = b @ a
    expected = (weight.float() + (delta.T if transposed else delta) * 0.3).to(dtype)
    assert torch.equal(changed(weight, LowRank(a, b, 0.3, transposed)), expected)


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (15, 1 << 20), (33, 1 << 16), (1 << 20,), (100, 5000), (7, 3, 2)])
def test_pieces_cover_the_rows_and_none_is_thin(shape: tuple[int, ...]) -> None:
    slices = row_slices(shape)
    assert [row for rows in slices for row in range(rows.start, rows.stop)] == list(range(shape[0]))
    assert all(rows.stop - rows.start >= min(16, shape[0]) for rows in slices)
    assert all(rows.start % 16 == 0 for rows in slices)


def test_what_an_adapter_does_by_name() -> None:
    a, b, bias, head = torch.ones(2, 3), torch.ones(4, 2), torch.ones(4), torch.ones(5, 3)
    found = changes(
        {
            f"{P}1.q.lora_A.weight": a,
            f"{P}1.q.lora_B.weight": b,
            f"{P}1.q.base_layer.bias": bias,
            "base_model.model.lm_head.weight": head,
        },
        {"r": 2, "lora_alpha": 3, "fan_in_fan_out": True},
    )
    assert found == {
        "model.layers.1.q.weight": LowRank(a, b, 1.5, transposed=True),
        "model.layers.1.q.bias": bias,
        "lm_head.weight": head,
    }
    assert torch.equal(changed(torch.zeros(4, dtype=torch.bfloat16), bias), torch.ones(4, dtype=torch.bfloat16))
