"""How fast a device multiplies matrices: what operations are divided by to get time."""

import time
from dataclasses import dataclass

import torch

from fedproxy.config import Train
from fedproxy.models.precision import bf16_is_fast

_SIZES = {"cpu": 1024, "cuda": 8192}
_SECONDS = 0.5


@dataclass(frozen=True)
class Speed:
    """Operations in a second.

    Attributes:
        flops: Floating-point operations in a second.
        source: Where the number comes from, in words.
    """

    flops: float
    source: str


def given_speed(tflops: float) -> Speed:
    """A speed that the user gives, in TFLOP/s."""
    return Speed(tflops * 1e12, "as given")


def measure_speed(train: Train) -> Speed:
    """Measure the product of two square matrices on this machine, in the precision that [train] would compute in.

    The fastest of some half second of products counts: a bound that training, with its many small operations, stays
    below.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    narrow = train.precision == "bf16" or (train.precision == "auto" and bf16_is_fast(device))
    dtype, size = torch.bfloat16 if narrow else torch.float32, _SIZES[device.type]
    generator = torch.Generator(device).manual_seed(0)
    one, other = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        started = time.perf_counter()
        torch.mm(one, other)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"this CPU, {torch.get_num_threads()} threads"
    )
    return Speed(2 * size**3 / best, f"a product of {str(dtype).removeprefix('torch.')} matrices on {where}")
