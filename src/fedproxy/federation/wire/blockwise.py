"""Values as whole multiples of a step, which each block of neighbours has for itself; rounded at random, unbiased.

    s = max |x| / L in a block, rounded up to bfloat16;   q = ⌊x/s⌋ + [u < x/s − ⌊x/s⌋];   x̂ = q·s

with L = 127 (int8) or 7 (int4) and u uniform in 0 ... 1, so E[x̂] = x. The draws are those of SplitMix64 at the value's
index, so they depend neither on chunks nor on threads, and not on torch's generator. u has 23 bits and x/s those of
float32: the expectation is within 2^-17 of a step. A multiple of the step, zero among them, comes back exactly. q·s has
15 bits at most, so it is exact in float32 and the same on every machine.

Reference: Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", 2017, Section
3.1 (random rounding; there with the norm of the whole vector for a step). Dettmers et al., "8-bit Optimizers via
Block-wise Quantization", 2022 (the largest magnitude of a block).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from fedproxy.errors import ArtifactError
from fedproxy.federation.wire.contract import Code, Parts, Sizes
from fedproxy.federation.wire.dense import dense
from fedproxy.federation.wire.packing import pack, packed_bytes, unpack
from fedproxy.splitmix64 import splitmix64
from fedproxy.tensors import CHUNK_ELEMENTS, Tensors

Block = Literal[32, 64, 128, 256]
"""Values that share a step. The error for the same bytes was least at 128, on Gaussian values and on LoRA updates."""

_DRAWN_BITS = 23


@dataclass(frozen=True)
class BlockwiseOptions:
    """Options of `int8` and `int4`.

    Attributes:
        block: Values that share a step.
    """

    block: Block = 128


def blockwise(bits: Literal[4, 8], block: int) -> Code:
    """The code that writes each value as a multiple of its block's step.

    Args:
        bits: Of a multiple, -L ... L with L = 2^(bits-1) - 1; four are packed as q + 7, two a byte.
        block: Values that share a step, a power of two.
    """
    levels = (1 << (bits - 1)) - 1
    largest = _largest_step(levels)
    carrier = torch.int8 if bits == 8 else torch.uint8

    def sizes(count: int) -> Sizes:
        return {"codes": (carrier, packed_bytes(count, bits)), "scales": (torch.bfloat16, -(-count // block))}

    def encode(values: torch.Tensor, key: int) -> Parts:
        multiples = torch.empty(len(values), dtype=torch.int8)
        steps = torch.empty(-(-len(values) // block), dtype=torch.bfloat16)
        for start in range(0, len(values), CHUNK_ELEMENTS):
            some = values[start : start + CHUNK_ELEMENTS]
            blocks = torch.nn.functional.pad(some, (0, -len(some) % block)).view(-1, block)
            step = _steps(blocks.abs().amax(dim=1), levels, largest)
            steps[start // block : start // block + len(step)] = step
            scaled = blocks / step.float().masked_fill(step == 0, 1.0)[:, None]
            rounded = _rounded(scaled.view(-1), key, start).clamp_(-levels, levels)
            multiples[start : start + len(some)] = rounded[: len(some)]
        return {"codes": multiples if bits == 8 else pack(multiples + levels, bits), "scales": steps}

    def decode(parts: Tensors, count: int, where: str) -> torch.Tensor:
        steps = parts["scales"].float()
        if not ((steps >= 0) & (steps <= largest)).all():  # NaN fails every comparison
            raise ArtifactError(f"{where} has a scale that is NaN, negative, or above {largest:g}.")
        if bits == 8:
            multiples = parts["codes"]
        else:
            multiples = unpack(parts["codes"], count, bits, where).view(torch.int8) - levels
        if count and not -levels <= int(multiples.min()) <= int(multiples.max()) <= levels:
            raise ArtifactError(f"{where} has a code beyond ±{levels}.")
        whole = count // block * block
        values = torch.empty(count)
        torch.mul(multiples[:whole].view(-1, block), steps[: whole // block, None], out=values[:whole].view(-1, block))
        torch.mul(multiples[whole:], steps[whole // block :], out=values[whole:])
        return values

    return Code(sizes, encode, decode)


def _largest_step(levels: int) -> float:
    """The largest bfloat16 that times `levels` is finite in float32."""
    bits = torch.tensor(torch.finfo(torch.float32).max / levels).view(torch.int32)
    return float((bits >> 16 << 16).view(torch.float32))


def _steps(largest: torch.Tensor, levels: int, most: float) -> torch.Tensor:
    """Magnitudes, float32, divided by `levels` and rounded up to bfloat16; positive ones stay positive."""
    bits = torch.maximum((largest / levels).view(torch.int32), largest.view(torch.int32).clamp(max=1))
    return ((bits + 0xFFFF) >> 16 << 16).view(torch.float32).clamp_(max=most).bfloat16()


def _rounded(values: torch.Tensor, key: int, start: int) -> torch.Tensor:
    """Values [m] whose first has the index `start`, an even number, rounded down or up at random; [m], float32."""
    indices = torch.arange(start // 2, (start + len(values) + 1) // 2)
    draws = splitmix64(key, indices).view(torch.int32)[: len(values)]
    uniform = ((draws >> (32 - _DRAWN_BITS)) & ((1 << _DRAWN_BITS) - 1)).float().add_(0.5).mul_(2.0**-_DRAWN_BITS)
    down = values.floor()
    return down.add_(uniform < values - down)


INT8 = dense("int8", BlockwiseOptions, lambda options: blockwise(8, options.block))
INT4 = dense("int4", BlockwiseOptions, lambda options: blockwise(4, options.block))
