"""Small random adapters, and what their layers compute with."""

import torch

SHAPES = {"model.0.q": (7, 5), "model.0.up": (9, 7), "model.1.q": (7, 5)}
"""Layer → [m, n]."""


def adapter(rank=3, *, seed=0, scale=1.0, b_scale=1.0, shapes=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer, (m, n) in (shapes or SHAPES).items():
        found[f"{layer}.lora_A.weight"] = (scale * torch.randn(rank, n, generator=generator)).to(dtype)
        found[f"{layer}.lora_B.weight"] = (scale * b_scale * torch.randn(m, rank, generator=generator)).to(dtype)
    return found


def plus(first, second):
    return {name: tensor + second[name] for name, tensor in first.items()}


def minus(first, second):
    return {name: tensor - second[name] for name, tensor in first.items()}


def zeros(like):
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def products(of):
    """Layer → B·A in float64."""
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in of})
    return {layer: of[f"{layer}.lora_B.weight"].double() @ of[f"{layer}.lora_A.weight"].double() for layer in layers}


def distance(found, expected):
    """Largest relative Frobenius error over the layers."""
    assert found.keys() == expected.keys()
    return max(
        float((found[layer].double() - expected[layer].double()).norm() / expected[layer].double().norm().clamp(min=1))
        for layer in expected
    )


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
