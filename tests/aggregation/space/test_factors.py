import torch

from fedproxy.aggregation.space.factors import FACTORS

A, B = "l.lora_A.weight", "l.lora_B.weight"


def test_factors_by_hand():
    adapter = {A: torch.tensor([[1.0, 2.0]]), B: torch.tensor([[3.0]])}
    update = {A: torch.tensor([[0.5, -1.0]]), B: torch.tensor([[0.25]])}
    assert FACTORS.vector(adapter, update) is update
    after = FACTORS.apply(adapter, update)
    assert after[A].tolist() == [[1.5, 1.0]]
    assert after[B].tolist() == [[3.25]]
    assert FACTORS.trains(A)
    assert FACTORS.trains(B)
