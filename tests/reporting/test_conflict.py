import pytest
import torch

from fedproxy.errors import ArtifactError
from fedproxy.reporting.conflict import kind_of, load_conflict, mean_conflict

from .sample import write_conflict

PREFIX = "base_model.model.model.layers"


def test_means_by_hand():
    tensors = {
        f"{PREFIX}.0.mlp.up_proj.lora_A.weight": torch.tensor([[0.0, 1.0]]),
        f"{PREFIX}.0.mlp.up_proj.lora_B.weight": torch.tensor([[1.0], [1.0]]),
        f"{PREFIX}.0.self_attn.q_proj.lora_B.weight": torch.tensor([[0.5], [0.5]]),
        f"{PREFIX}.1.self_attn.q_proj.lora_B.weight": torch.tensor([[0.25]]),
    }
    means, blocks = mean_conflict(tensors, [2, 7])
    assert means == {(2, "mlp.up_proj"): 0.75, (2, "self_attn.q_proj"): 0.5, (7, "self_attn.q_proj"): 0.25}
    assert blocks == {2: pytest.approx(4 / 6), 7: 0.25}


def test_experts_are_one_kind():
    names = ["mlp.experts.0.up_proj.lora_A.weight", "mlp.experts.3.up_proj.lora_B.weight"]
    assert {kind_of(name) for name in names} == {"mlp.experts.up_proj"}
    assert kind_of("self_attn.q_proj.bias") == "self_attn.q_proj"


def test_rounds_without_conflict_are_left_out(tmp_path):
    write_conflict(tmp_path, rounds=3)
    (tmp_path / "rounds" / "0002" / "conflict.safetensors").unlink()
    assert [each.round for each in load_conflict(tmp_path, list(range(6)))] == [1, 3]
    assert load_conflict(tmp_path / "nowhere", [0]) == []


def test_another_proxy_and_a_damaged_file_are_artifact_errors(tmp_path):
    write_conflict(tmp_path, rounds=1)
    with pytest.raises(ArtifactError, match="the layer map has 5 blocks, no block 5"):
        load_conflict(tmp_path, list(range(5)))
    (tmp_path / "rounds" / "0001" / "conflict.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match=r"conflict\.safetensors"):
        load_conflict(tmp_path, list(range(6)))
