from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedproxy.errors import ArtifactError
from fedproxy.models.lora import adapter_shapes, adapter_state, attach
from fedproxy.models.shape import entries, open_shape, size
from fedproxy.models.source import open_source
from tests.conftest import FAMILIES, MULTIMODAL, make_model


@pytest.mark.parametrize("family", [*FAMILIES, *MULTIMODAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_files(
    family: str, dtype: torch.dtype, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    files = tiny_checkpoint(family, dtype=dtype)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((files / "config.json").read_bytes())
    found, stored = open_shape(bare), open_source(files)
    assert all(weight.is_meta for weight in found.decoder.parameters())
    assert found.bytes == stored.files.bytes
    assert found.count == stored.count
    keep = [0, 3, 4]
    held = [*stored.outer_tensors().values(), *(t for i in keep for t in stored.block_tensors(i).values())]
    assert size(found.with_blocks(keep)) == sum(tensor.end - tensor.begin for tensor in held)
    assert entries(found.with_blocks(range(found.count))) == entries(found.decoder.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [[0, 2], range(6)])
def test_shapes_of_an_adapter_are_those_that_attach_makes(family: str, layers: list[int]) -> None:
    shapes = adapter_shapes(make_model(family).to("meta"), r=3, layers=layers)
    made = adapter_state(attach(make_model(family), r=3, alpha=6, dropout=0.0, layers=list(layers), seed=0))
    assert shapes == {name: tensor.shape for name, tensor in made.items()}


def test_shapes_of_chosen_targets() -> None:
    shapes = adapter_shapes(make_model("gpt2"), r=3, targets="c_attn", layers=[1])
    assert list(shapes.values()) == [(3, 32), (96, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "JSON object"),
        ("{", "not valid JSON"),
        ('{"model_type": "unheard-of"}', "no language model"),
        ('{"model_type": "t5"}', "no causal language model|encoder-decoder"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "quantised"),
        ('{"auto_map": {}, "model_type": "own"}', "Python code of its own"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000}', "1000000000 blocks"),
    ],
)
def test_bad_configurations(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        open_shape(tmp_path)


def test_no_model_of_that_name() -> None:
    for name in ("/absent", "nobody/nothing"):
        with pytest.raises(ArtifactError, match=f"{name} is no checkpoint"):
            open_shape(name)
