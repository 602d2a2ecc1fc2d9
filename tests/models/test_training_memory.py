import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fedproxy
from fedproxy.config import Train
from fedproxy.models.families import blocks
from fedproxy.models.training_memory import DecoderNumbers, decoder_numbers, training_memory
from tests.conftest import FAMILIES, make_model

EXPERTS = ("mixtral", "qwen3_moe")
"""Families whose feed-forward layers are no linear layers that an adapter could go onto."""
ONE = DecoderNumbers(
    parameters=1000,
    weight_bytes=2,
    blocks=1,
    width=10,
    heads=2,
    vocabulary=100,
    inner=20,
    linears=((10, 20), (20, 10)),
    adapted=(True, False),
)
SETTINGS = Train(batch_size=3, max_length=300, lora_r=4, lora_dropout=0.1)


def test_by_hand() -> None:
    """Two layers of 10 → 20 → 10; the first has an adapter of rank 4. Hidden states are small: 1.75 times on a CPU."""
    cpu, gpu = (training_memory(ONE, SETTINGS, device) for device in ("cpu", "gpu"))
    assert (cpu.weights, gpu.weights) == (4000, 2000)
    assert (cpu.adapter, gpu.adapter) == (4 * 30 * 16, 4 * 30 * 18)
    outputs, inside = 20 + 10, 20 + 10
    assert cpu.activations == 1.75 * 900 * (4 * (outputs + 10 + 4 + inside) + 10 + 100 * 12)
    assert gpu.activations == 900 * (2 * (outputs + 10 + 4 + inside) + 10 + 2 * 4 * 10 + 100 * 10)
    assert cpu.total == cpu.weights + cpu.adapter + cpu.activations


def test_quantised_linear_layers_take_four_bits_and_scales() -> None:
    narrow = Train(batch_size=3, max_length=300, lora_r=4, quantization="4bit")
    rest, linear = 1000 - 400, 400 * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    assert training_memory(ONE, narrow, "cpu").weights == rest * 4 + int(linear)
    assert training_memory(ONE, narrow, "gpu").weights == rest * 2 + int(linear)
    assert training_memory(ONE, narrow, "gpu").adapter == training_memory(ONE, SETTINGS, "gpu").adapter


def test_short_rows_keep_attention_weights_on_a_cpu() -> None:
    short = training_memory(ONE, Train(batch_size=1, max_length=256, lora_r=4), "cpu").activations
    a_token = training_memory(ONE, SETTINGS, "cpu").activations / 900
    assert short == 256 * (a_token + 1.75 * 4 * 2 * 256)


def test_checkpointing_takes_less() -> None:
    deep = DecoderNumbers(1000, 2, 8, 10, 2, 100, 20, ONE.linears * 8, (True, True) * 8)
    settings = {"batch_size": 3, "max_length": 300, "lora_r": 4}
    assert (
        training_memory(deep, Train(**settings, gradient_checkpointing=True), "gpu").total  # type: ignore[arg-type]
        < training_memory(deep, Train(**settings), "gpu").total  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_of_a_decoder(family: str) -> None:
    model = make_model(family, dtype=torch.bfloat16)
    found = decoder_numbers(model, [0, 2], "all-linear", 5)
    assert (found.blocks, found.width, found.heads, found.vocabulary, found.weight_bytes) == (2, 32, 4, 260, 2)
    assert found.parameters == 5
    assert all(found.adapted)
    weights = [named for i in (0, 2) for named in blocks(model)[i].named_parameters() if named[1].ndim == 2]
    linear = [weight for name, weight in weights if family not in EXPERTS or "attn" in name]
    assert sorted(a * b for a, b in found.linears) == sorted(weight.numel() for weight in linear)
    assert found.inner == max(max(weight.shape) if family == "gpt2" else weight.shape[1] for weight in linear)


def test_only_chosen_layers_are_adapted() -> None:
    found = decoder_numbers(make_model("gpt2"), range(6), ["c_attn", "mlp.c_proj"], 5)
    assert found.linears[:4] == ((32, 96), (32, 32), (32, 128), (128, 32))
    assert found.adapted == (True, False, False, True) * 6


MEASURE = """
import gc, sys
from pathlib import Path
import torch
from fedproxy.config import Train
from fedproxy.models.checkpoints import load_model
from fedproxy.models.lora import attach
from fedproxy.models.encoding import Encoded
from fedproxy.models.training import train

torch.set_num_threads(1)
llm, rows, length, checkpointing = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1"


def job(settings):
    model = attach(load_model(llm, dtype=torch.float32), r=32, alpha=64, dropout=0.1, seed=0)
    ids = torch.randint(3, 3000, (settings.batch_size * settings.max_steps, settings.max_length)).tolist()
    train(model, [Encoded(row, 1) for row in ids], settings, pad=0, seed=0)


def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1]) * 1024


job(Train(batch_size=1, max_length=8, max_steps=1, precision="fp32"))
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
job(Train(batch_size=rows, max_length=length, max_steps=2, precision="fp32", gradient_checkpointing=checkpointing))
print(resident("VmHWM") - before)
"""


@pytest.mark.long
@pytest.mark.parametrize(("rows", "length", "checkpointing"), [(4, 512, False), (8, 128, True)])
def test_a_real_training_takes_what_was_estimated(rows: int, length: int, checkpointing: bool) -> None:
    """The most of two processes: what the C library keeps differs by a tenth from one to the next."""
    llm = Path(fedproxy.__file__).parent / "demo" / "llm"
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, llm, str(rows), str(length), str(int(checkpointing))]
    found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    from fedproxy.models.checkpoints import load_model

    model = load_model(llm)
    numbers = decoder_numbers(model, range(12), "all-linear", sum(weight.numel() for weight in model.parameters()))
    settings = Train(batch_size=rows, max_length=length, gradient_checkpointing=checkpointing)
    estimate = training_memory(numbers, settings, "cpu").total
    assert 0.7 < estimate / max(int(said.split()[-1]) for said in found) < 1.3
