import pytest
import torch

from fedproxy.aggregation.merge import merge
from fedproxy.aggregation.space import trained
from fedproxy.aggregation.space.frozen_a import FROZEN_A
from fedproxy.errors import ArtifactError
from tests.aggregation.space.adapters import adapter, distance, plus, products

A, B = "l.lora_A.weight", "l.lora_B.weight"


def test_frozen_a_by_hand():
    given = {A: torch.tensor([[1.0, 2.0]]), B: torch.tensor([[3.0]])}
    update = {B: torch.tensor([[0.25]])}
    assert FROZEN_A.vector(given, update) == update
    after = FROZEN_A.apply(given, update)
    assert after[A] is given[A]
    assert after[B].tolist() == [[3.25]]
    assert not FROZEN_A.trains(A)
    assert FROZEN_A.trains(B)


def test_an_update_of_a_is_refused():
    given = {A: torch.ones(1, 2), B: torch.ones(1, 1)}
    with pytest.raises(ArtifactError, match=r"lora_A\.weight is unknown"):
        FROZEN_A.vector(given, given)


def test_the_mean_of_b_is_the_mean_of_the_products():
    given = adapter()
    updates = [trained(FROZEN_A, adapter(seed=k + 1)) for k in range(3)]
    after = FROZEN_A.apply(given, merge([FROZEN_A.vector(given, update) for update in updates], "mean")[0])
    own = [products({**given, **plus(trained(FROZEN_A, given), update)}) for update in updates]
    assert distance(products(after), {layer: sum(one[layer] for one in own) / 3 for layer in own[0]}) <= 1e-6
