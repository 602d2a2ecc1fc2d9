import pytest

from fedproxy import layer_map
from fedproxy.errors import ArtifactError, UsageError

PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("path", "rest"),
    [
        ("model.layers", "self_attn.q_proj.lora_A.weight"),
        ("transformer.h", "attn.c_attn.lora_B.weight"),
        ("model.decoder.layers", "fc1.lora_A.weight"),
        ("gpt_neox.layers", "attention.query_key_value.lora_B.weight"),
        ("model.layers", "mlp.experts.3.up_proj.lora_A.weight"),
    ],
)
def test_rekey_moves_the_block_number_and_nothing_else(path: str, rest: str) -> None:
    name = f"{PREFIX}{path}.2.{rest}"
    assert layer_map.split_name(name) == (path, 2, rest)
    assert layer_map.rekey(name, [0, 5, 11], path) == f"{PREFIX}{path}.11.{rest}"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.q_proj.lora_A.weight",
        f"{PREFIX}lm_head.lora_A.weight",
        f"{PREFIX}model.layers.01.q_proj.lora_A.weight",
        f"{PREFIX}model.layers.-1.q_proj.lora_A.weight",
        f"{PREFIX}model.layers.2.q_proj.lora_A.weight",
        f"{PREFIX}model.towers.0.q_proj.lora_A.weight",
        "",
    ],
)
def test_rekey_refuses_what_is_no_tensor_of_a_mapped_block(name: str) -> None:
    with pytest.raises(ArtifactError, match="adapter tensor"):
        layer_map.rekey(name, [0, 3], "model.layers")


def test_negative_block_numbers_count_from_the_end() -> None:
    assert layer_map.block_numbers([-1, 0, 5, 1, -2], 6) == [0, 1, 4, 5]
    for wrong in (6, -7):
        with pytest.raises(UsageError, match="from -6 to 5"):
            layer_map.block_numbers([0, wrong], 6)
