"""The contract of a space: in which coordinates the clients' updates of the adapter are merged."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedproxy.tensors import Tensors


@dataclass(frozen=True)
class Space:
    """The coordinates in which adapters are merged.

    A round goes through it so: client k gets φ_k,t = `for_rank(φ_t, r_k)` (or φ_t itself), trains the tensors that
    `trains` names, and returns their update τ_k. The server merges `vector(φ_k,t, τ_k)` of all clients by any rule, and
    `apply(φ_t, merged)` is φ_{t+1}. Adapters are pairs of LoRA by their PEFT names, `LAYER.lora_A.weight` [r, n] and
    `LAYER.lora_B.weight` [m, r].

    Attributes:
        name: Its name in configurations.
        trains: Whether a client trains and sends the adapter's tensor of that name.
        vector: The adapter that a client was given and its update → what is merged of it. ArtifactError if they do
            not fit.
        apply: The adapter φ_t and the merged vector (as a server optimizer leaves it) → all of φ_{t+1}; nothing given
            is changed. ArtifactError if they do not fit.
        for_rank: The adapter and a client's rank → the adapter as that client gets it, with the leading rows of A and
            columns of B. None: all have one rank.
        lasting: Whether what is merged are trained parameters that keep their meaning from round to round, so that the
            conflict of a merge (Eq. 7), what regularisers carry, and differences from the first adapter go by them.
        disputed: Where it is not lasting: φ_{t+1} and the disagreement K - |Σ sign| at each merged coordinate → that at
            each trained parameter of φ_{t+1}, in whole numbers too. None: there is no conflict.
    """

    name: str
    trains: Callable[[str], bool]
    vector: Callable[[Tensors, Tensors], Tensors]
    apply: Callable[[Tensors, Tensors], dict[str, torch.Tensor]]
    for_rank: Callable[[Tensors, int], dict[str, torch.Tensor]] | None
    lasting: bool
    disputed: Callable[[Tensors, Tensors], dict[str, torch.Tensor]] | None = None

    def levels(self, adapter: Tensors, merged: Tensors) -> Tensors:
        """The clients' disagreement at each trained parameter, of which the next round's conflict (Eq. 7) is made.

        Args:
            adapter: φ_{t+1}.
            merged: The disagreement at each merged coordinate; empty if none was counted.

        Returns:
            Name of a trained tensor → whole numbers of its shape; empty where there is no such thing.
        """
        if self.lasting or not merged:
            return merged
        return self.disputed(adapter, merged) if self.disputed else {}


def trained(space: Space, adapter: Tensors) -> dict[str, torch.Tensor]:
    """The adapter's tensors that a client trains and sends."""
    return {name: tensor for name, tensor in adapter.items() if space.trains(name)}
