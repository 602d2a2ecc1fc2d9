"""Straightforward float64 references for the merge rules: whole vectors, full sorts, a loop a coordinate."""

import math

import numpy as np
import torch


def flat(tensors):
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])


def trim(vector, count):
    order = np.argsort(-np.abs(vector), kind="stable")[:count]
    kept = np.zeros_like(vector)
    kept[order] = vector[order]
    return kept


def cosines(stack):
    count = len(stack)
    result = np.zeros((count, count))
    for k in range(count):
        for j in range(count):
            lengths = math.sqrt(math.fsum(stack[k] ** 2)) * math.sqrt(math.fsum(stack[j] ** 2))
            result[k, j] = math.fsum(stack[k] * stack[j]) / lengths if lengths else 0.0
    return result


def h_ties_settings(stack, r0=1.0, delta=0.2):
    """Weights and numbers of kept entries, Eq. 5, 6, 10."""
    count, length = stack.shape
    if count == 1:
        return [1.0], [length]
    similarity = cosines(stack)
    others = [[j for j in range(count) if j != k] for k in range(count)]
    away = [1 - sum(max(0.0, similarity[k, j]) for j in others[k]) / (count - 1) for k in range(count)]
    scores = [math.exp(sum(abs(similarity[k, j]) for j in others[k])) for k in range(count)]
    low, high = min(away), max(away)
    scaled = [(h - low) / (high - low) if high - low > 1e-9 else 0.0 for h in away]
    shares = [min(1.0, max(0.0, r0 - delta * h)) for h in scaled]
    return [score / sum(scores) for score in scores], [math.floor(share * length + 1e-9) for share in shares]


def h_ties(stack, rho=1.1, r0=1.0, delta=0.2):
    weights, keep = h_ties_settings(stack, r0, delta)
    kept = [trim(vector, count) for vector, count in zip(stack, keep, strict=True)]
    merged = np.zeros(stack.shape[1])
    for place in range(stack.shape[1]):
        pairs = [(weight, vector[place]) for weight, vector in zip(weights, kept, strict=True)]
        up, down = [(w, v) for w, v in pairs if v > 0], [(w, v) for w, v in pairs if v < 0]
        p, n = math.fsum(w * v for w, v in up), -math.fsum(w * v for w, v in down)
        if p >= rho * n and p > 0:
            merged[place] = p / math.fsum(w for w, _ in up)
        elif n >= rho * p and n > 0:
            merged[place] = -n / math.fsum(w for w, _ in down)
    return merged


def ties(stack, density=0.2):
    kept = [trim(vector, math.floor(density * stack.shape[1] + 1e-9)) for vector in stack]
    merged = np.zeros(stack.shape[1])
    for place in range(stack.shape[1]):
        values = [vector[place] for vector in kept]
        total = math.fsum(values)
        same = [value for value in values if value * total > 0]
        merged[place] = math.fsum(same) / len(same) if same else 0.0
    return merged


def mean(stack, rows):
    return sum(count * vector for count, vector in zip(rows, stack, strict=True)) / sum(rows)


SHAPES = {"layer.b": (13,), "layer.a": (11, 7), "z": (2, 3, 5), "scalar": ()}


def random_updates(clients, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: (torch.randn(shape, generator=generator) * 0.01).to(dtype) for name, shape in SHAPES.items()}
        for _ in range(clients)
    ]


def tied_updates(clients, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randint(-2, 3, shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
        for _ in range(clients)
    ]


def scaled(update, factor):
    return {name: tensor * factor for name, tensor in update.items()}


def cases(dtype):
    """Random, degenerate and tied inputs by name."""
    first, second, third = random_updates(3, dtype, seed=7)
    return {
        "random": random_updates(4, dtype),
        "many": random_updates(9, dtype, seed=1),
        "one": [first],
        "two": [first, second],
        "zero update": [first, second, scaled(third, 0.0)],
        "only zeros": [scaled(first, 0.0)] * 3,
        "all equal": [first] * 3,
        "opposite": [first, scaled(first, -1.0)],
        "two against one": [first, scaled(first, -1.0), first],
        "uneven": [first, scaled(second, 100.0), scaled(third, 0.01)],
        "tied": tied_updates(4, dtype),
        "tied, three": tied_updates(3, dtype, seed=5),
    }


def agree(merged, expected, dtype):
    """Equal to 1e-6 of the largest magnitude, after rounding the reference to the dtype."""
    rounded = torch.from_numpy(expected).to(dtype).double().numpy()
    bound = 1e-6 * max(1e-30, np.abs(rounded).max())
    return bool((np.abs(flat(merged) - rounded) <= bound).all())
