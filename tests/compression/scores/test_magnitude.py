import pytest
import torch

from fedproxy.errors import ArtifactError
from fedproxy.models.block_stream import BlockStream
from tests.compression.scores.streams import score
from tests.conftest import make_model


def test_by_hand() -> None:
    """Block 1 holds ±0.5, block 0 ones and an equal number of threes in its norms, block 2 zeros."""
    model = make_model(num_hidden_layers=3)
    with torch.no_grad():
        for number, value in enumerate([1.0, -0.5, 0.0]):
            for weight in model.model.layers[number].parameters():
                weight.fill_(value)
        model.model.layers[0].input_layernorm.weight.fill_(-3.0)
    block = model.model.layers[0]
    weights = sum(weight.numel() for weight in block.parameters())
    found = score("magnitude", BlockStream(model), [], most=2)
    assert found.scores == pytest.approx([(weights + 2 * 32) / weights, 0.5, 0.0])
    assert found.removals == [[], [2], [1, 2]]


def test_narrow_weights_are_summed_in_float64() -> None:
    model = make_model(num_hidden_layers=1, hidden_size=64, intermediate_size=2048, dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(0.1)
    assert score("magnitude", BlockStream(model), [], most=0).scores == [float(torch.tensor(0.1).bfloat16())]


def test_a_weight_that_is_no_number_is_refused() -> None:
    model = make_model()
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ArtifactError, match="block 2 is NaN"):
        score("magnitude", BlockStream(model), [])
