"""A merge rule of your own: each coordinate is a mean in which values far from the middle count little.

python examples/own_rule.py
"""

from dataclasses import dataclass

import torch

import fedproxy
from fedproxy.aggregation.merge import Rule


@dataclass(frozen=True)
class Options:
    """What an experiment may set, as `merge_options = { pull = 2.0 }`."""

    pull: float = 1.0


def nearest(values: torch.Tensor, weights: torch.Tensor, options: Options) -> torch.Tensor:
    """Weigh each client's value by how close it lies to the middle one; [clients, n] and [clients] → [n]."""
    middle = values.median(dim=0).values
    spread = (values - middle).abs().mean(dim=0).clamp_min(1e-12)
    closeness = weights[:, None] * torch.exp(-options.pull * (values - middle).abs() / spread)
    return (closeness * values).sum(dim=0) / closeness.sum(dim=0)


fedproxy.register_rule(
    Rule(
        name="nearest",
        options=Options,
        keep=lambda analysis, options: [1.0] * analysis.clients,  # each client keeps all of its values
        weights=lambda analysis, rows, options: analysis.weights,  # Eq. 6; None would weigh all alike
        combine=nearest,
    )
)

# Five clients learned about the same thing; the last one sends something else, ten times as large.
generator = torch.Generator().manual_seed(0)
truth = torch.randn(1000, generator=generator)
updates = [{"layer.weight": truth + 0.3 * torch.randn(1000, generator=generator)} for _ in range(4)]
updates.append({"layer.weight": -10 * truth})

for rule in ("mean", "h-ties", "median", "nearest"):
    merged, analysis = fedproxy.merge(updates, rule)
    error = (merged["layer.weight"] - truth).norm() / truth.norm()
    print(f"{rule}: relative error {error:.2f}")
merged, _ = fedproxy.merge(updates, "nearest", pull=3.0)
print(f"nearest, pull 3: relative error {(merged['layer.weight'] - truth).norm() / truth.norm():.2f}")
