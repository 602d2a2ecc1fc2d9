from dataclasses import replace
from typing import Any

import pytest
import torch

from fedproxy.config import Train
from fedproxy.errors import MissingExtraError, UsageError
from fedproxy.models import quantization
from fedproxy.models.families import blocks, linear_layers
from fedproxy.models.gradients import in_training
from fedproxy.models.layouts import layout_for, pack
from fedproxy.models.lora import adapter_parameters, adapter_state, set_adapter_state
from fedproxy.models.trainable import load_trainable
from fedproxy.models.training import train
from tests.models.test_layouts import PAD, examples

SETTINGS = Train(learning_rate=1e-2, batch_size=3, lora_r=2, lora_alpha=4, lora_dropout=0.0, quantization="4bit")
WIDE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "gemma2": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "gpt2": {"n_embd": 64},
    "mixtral": {"hidden_size": 64, "intermediate_size": 128},
}
"""Scales are shared by 64 weights; narrower layers are quantised badly."""


def test_without_bitsandbytes_the_extra_is_named(tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(MissingExtraError, match=r"4bit.*fedproxy\[qlora\]"):
        load_trainable(tiny_checkpoint(), SETTINGS, seed=0)


@pytest.mark.qlora
def test_without_a_device_that_it_can_use_it_says_so(tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.supported_torch_devices", {"npu"})
    with pytest.raises(UsageError, match="can use no device"):
        load_trainable(tiny_checkpoint(), SETTINGS, seed=0)


@pytest.mark.qlora
@pytest.mark.parametrize("family", WIDE)
class TestWithBitsandbytes:
    """What a real quantised model must do."""

    @pytest.fixture
    def load(self, family: str, tiny_checkpoint: Any) -> Any:
        path = tiny_checkpoint(family, **WIDE[family])
        return lambda settings=SETTINGS: load_trainable(path, settings, seed=0)

    def test_linear_layers_of_the_blocks_take_four_bits(self, load: Any) -> None:
        base = load().get_base_model()
        weights = [p for n, p in blocks(base).named_parameters() if ".base_layer.weight" in n]
        assert weights
        assert all(weight.dtype == torch.uint8 for weight in weights)
        assert base.get_output_embeddings().weight.dtype == torch.float32

    def test_the_adapter_begins_as_on_whole_weights(self, load: Any) -> None:
        four, whole = (adapter_state(load(replace(SETTINGS, quantization=q))) for q in ("4bit", "none"))
        assert four.keys() == whole.keys()
        assert all(torch.equal(tensor, whole[name]) for name, tensor in four.items())

    def test_gradients_are_those_of_the_dequantised_model(self, load: Any) -> None:
        """Also after an evaluation, in which bitsandbytes likes to change the layout of the weights."""
        from bitsandbytes.functional import dequantize_4bit

        four, whole = load(), load(replace(SETTINGS, quantization="none"))
        generator = torch.Generator().manual_seed(1)
        state = {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in adapter_state(four).items()
        }
        layers, wide = (linear_layers(blocks(model.get_base_model())) for model in (four, whole))
        for name, layer in wide.items():
            if name.endswith("base_layer"):
                weight = dequantize_4bit(layers[name].weight.data, layers[name].weight.quant_state).float()
                layer.weight.data = weight.T if type(layer).__name__ == "Conv1D" else weight
        four.eval()(input_ids=torch.tensor([examples()[0].ids]))
        found = []
        for model in (four, whole):
            set_adapter_state(model, state)
            with torch.random.fork_rng(), in_training(model, replace(SETTINGS, precision="fp32"), PAD) as backward:
                torch.manual_seed(0)
                backward([examples()], 1)
            found.append(torch.cat([p.grad.flatten() for p in adapter_parameters(model).values()]))
        assert (found[0] - found[1]).norm() < 0.25 * found[1].norm()

    def test_it_trains_on_packed_rows_and_the_base_stays(self, load: Any) -> None:
        model = load()
        assert layout_for(model, padding_free=True) is pack
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        done = train(model, examples(), SETTINGS, pad=PAD, seed=0, steps=12)
        assert sum(done.losses[-2:]) < sum(done.losses[:2])
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
