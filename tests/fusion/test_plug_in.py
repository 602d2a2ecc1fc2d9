import pytest
import torch
from torch import nn

from fedproxy.errors import ArtifactError
from fedproxy.fusion.plug_in import add_task_vector, check_fits, merge_into, rekey_adapter, rekey_config
from tests.conftest import make_model

P = "base_model.model.model.layers."


def test_equation_15_by_hand() -> None:
    """W + (alpha / r) B A with r = 2 and alpha = 4."""
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    a = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
    b = torch.tensor([[1.0, 1.0], [0.5, -2.0]])
    expected = torch.tensor([[3.0, 4.0, 5.0], [5.0, 1.0, 12.0]])
    assert torch.equal(add_task_vector(weight, a, b, 2.0), expected)
    assert torch.equal(add_task_vector(weight.T, a, b, 2.0, transposed=True), expected.T)


def test_the_sum_is_made_in_float32_and_rounded_once() -> None:
    weight = torch.tensor([[1.0]], dtype=torch.bfloat16)
    a, b = torch.tensor([[1.0 + 2**-10]]), torch.tensor([[2.0**-8]])
    assert add_task_vector(weight, a, b, 1.0).item() == 1.0 + 2**-7
    assert add_task_vector(weight, a, b * 0.99, 1.0).item() == 1.0
    assert add_task_vector(weight, a, b, 1.0).dtype == torch.bfloat16


def test_a_zero_task_vector_is_the_weight_itself() -> None:
    weight = torch.tensor([[-0.0, 1.0]])
    assert add_task_vector(weight, torch.ones(1, 2), torch.zeros(1, 1), 3.0) is weight


def test_rekeying_by_hand() -> None:
    a, b = torch.ones(1, 2), torch.tensor([[2.0], [4.0]])
    found = rekey_adapter({f"{P}1.q.lora_A.weight": a, f"{P}1.q.lora_B.weight": b}, [0, 4], "model.layers", 0.5)
    assert list(found) == [f"{P}4.q.lora_A.weight", f"{P}4.q.lora_B.weight"]
    assert torch.equal(found[f"{P}4.q.lora_A.weight"], a)
    assert torch.equal(found[f"{P}4.q.lora_B.weight"], torch.tensor([[1.0], [2.0]]))
    config = rekey_config({"r": 1, "layers_to_transform": [1]}, found, "transformer.h")
    assert config == {"r": 1, "layers_to_transform": [4], "layers_pattern": "h", "base_model_name_or_path": None}


def pair(block: int, module: str, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{P}{block}.{module}.lora_A.weight": torch.randn(2, inputs, generator=generator),
        f"{P}{block}.{module}.lora_B.weight": torch.randn(outputs, 2, generator=generator),
    }


def test_only_the_named_layer_of_the_named_block_changes() -> None:
    model, before = make_model(), make_model().state_dict()
    tensors = pair(3, "mlp.up_proj", 32, 48)
    merge_into(model, tensors, {"r": 2, "lora_alpha": 3})
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.layers.3.mlp.up_proj.weight"}
    a, b = tensors.values()
    expected = before["model.layers.3.mlp.up_proj.weight"].double() + 1.5 * b.double() @ a.double()
    assert torch.allclose(model.model.layers[3].mlp.up_proj.weight.double(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (pair(6, "mlp.up_proj", 32, 48), {}, "no linear layer"),
        (pair(0, "mlp.sideways", 32, 48), {}, "no linear layer"),
        (pair(0, "mlp", 32, 48), {}, "no linear layer"),
        (pair(0, "mlp.up_proj", 33, 48), {}, "32 inputs and 48 outputs"),
        (pair(0, "mlp.up_proj", 32, 47), {}, "32 inputs and 48 outputs"),
        (pair(0, "mlp.up_proj", 48, 32), {"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_tensors_that_fit_no_layer_are_refused(
    tensors: dict[str, torch.Tensor], config: dict[str, object], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        check_fits(make_model(), tensors, config)


def test_a_sum_that_overflows_is_refused() -> None:
    model: nn.Module = make_model(dtype=torch.float16)
    tensors = {name: 1e4 * tensor for name, tensor in pair(0, "mlp.up_proj", 32, 48).items()}
    with pytest.raises(ArtifactError, match="overflows"):
        merge_into(model, tensors, {"r": 2, "lora_alpha": 2})  # type: ignore[arg-type]
