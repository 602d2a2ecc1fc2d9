import pytest
import torch

from fedproxy.errors import ArtifactError
from fedproxy.fusion.plug_in import TaskVector, rekey_adapter, rekey_config, shifted

P = "base_model.model.model.layers."


def test_rekeying_by_hand() -> None:
    a, b = torch.ones(1, 2), torch.tensor([[2.0], [4.0]])
    moved = rekey_adapter({f"{P}1.q.lora_A.weight": a, f"{P}1.q.lora_B.weight": b}, [0, 4], "model.layers")
    found = TaskVector(moved, {}, {}).at(0.5)
    assert list(found) == [f"{P}4.q.lora_A.weight", f"{P}4.q.lora_B.weight"]
    assert torch.equal(found[f"{P}4.q.lora_A.weight"], a)
    assert torch.equal(found[f"{P}4.q.lora_B.weight"], torch.tensor([[1.0], [2.0]]))


def lora(*modules: str) -> list[str]:
    return [f"base_model.model.{module}.lora_{side}.weight" for module in modules for side in "AB"]


def test_the_configuration_puts_an_adapter_where_its_tensors_are() -> None:
    names = lora("model.layers.4.q", "model.layers.4.mlp.up", "model.layers.7.q", "model.layers.7.mlp.up")
    before = {"r": 1, "layers_to_transform": [1, 2], "target_modules": ["up", "q"], "exclude_modules": ["x"]}
    config = rekey_config(before, names, "model.layers")
    compact = {"target_modules": ["mlp.up", "q"], "layers_to_transform": [4, 7], "layers_pattern": "layers"}
    none = {"base_model_name_or_path": None, "exclude_modules": None, "modules_to_save": None}
    assert config == {"r": 1, **none, **compact}


def test_the_configuration_spells_modules_out_where_suffixes_would_find_others() -> None:
    names = lora("model.layers.4.q", "model.layers.4.mlp.up", "model.layers.7.q")
    names += ["base_model.model.model.layers.4.norm.weight", "base_model.model.lm_head.weight"]
    config = rekey_config({"modules_to_save": ["norm", "lm_head"]}, names, "model.layers")
    assert config["target_modules"] == ["model.layers.4.mlp.up", "model.layers.4.q", "model.layers.7.q"]
    assert config["layers_to_transform"] is config["layers_pattern"] is None
    assert config["modules_to_save"] == ["lm_head", "model.layers.4.norm"]
    assert rekey_config({}, names[:4], "model.layers", spell_out=True)["target_modules"] == [
        "model.layers.4.mlp.up",
        "model.layers.4.q",
    ]


def test_the_task_vector_of_a_trained_weight_by_hand() -> None:
    """The LLM holds 10, the healed proxy 12, which training made 15: 10 + 2 * (15 - 12)."""
    found = shifted(torch.tensor([10.0]), torch.tensor([15.0]), torch.tensor([12.0]), 2.0)
    assert torch.equal(found, torch.tensor([16.0]))


def test_a_trained_weight_of_an_unhealed_proxy_comes_back_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    own, trained = torch.randn(2, 1000, generator=generator)
    assert torch.equal(shifted(own, trained, own, 1.0), trained)


def test_a_trained_weight_that_overflows_is_refused() -> None:
    own, trained = torch.tensor([6e4], dtype=torch.float16), torch.tensor([6.5e4])
    with pytest.raises(ArtifactError, match="overflows"):
        shifted(own, trained, own, 2.0)
