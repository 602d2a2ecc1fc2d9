import pytest
import torch

from fedproxy.aggregation.space.pairs import layers
from fedproxy.errors import ArtifactError
from tests.aggregation.space.adapters import SHAPES, adapter


def test_the_layers_of_an_adapter():
    assert layers(adapter()) == sorted(SHAPES)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"l.lora_A.weight": torch.ones(1, 2)}, "l: the adapter holds no pair"),
        ({"l.bias": torch.ones(2)}, "l.bias: the adapter holds no pair"),
        ({"l.lora_A.weight": torch.ones(1, 2), "l.lora_B.weight": torch.ones(2)}, "l: the adapter holds no pair"),
        (
            {"l": torch.ones(1), "l.lora_A.weight": torch.ones(1, 2), "l.lora_B.weight": torch.ones(2, 1)},
            "l: the adapter holds no pair",
        ),
        ({"l.lora_A.weight": torch.ones(1, 2), "l.lora_B.weight": torch.ones(2, 3)}, "3 columns, lora_A 1 rows"),
    ],
)
def test_what_is_no_pair_is_refused(change, said):
    with pytest.raises(ArtifactError, match=said):
        layers({**adapter(), **change})
