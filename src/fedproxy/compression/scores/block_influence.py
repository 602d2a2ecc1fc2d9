"""Block influence: how far a block turns the hidden state that passes through it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedproxy.compression.calibrate import Batch
from fedproxy.models.checkpoints import Model
from fedproxy.models.families import blocks


def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the cosine along the last dimension in float64, 0 where a vector is zero.

    Args:
        x: [..., width].
        y: [..., width].

    Returns:
        Cosines, [...].
    """
    x, y = x.double(), y.double()
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    products = (x * y).sum(dim=-1)
    return torch.where(norms > 0, products / norms.where(norms > 0, 1.0), products * 0)


def block_influence(model: Model, batches: Sequence[Batch], progress: Callable[[float], None]) -> list[float]:
    """Return the block influence of every block.

    BI_i = 1 - mean cos(h_i, h_{i+1}), with h_i the hidden state entering block i and h_{i+1} the one leaving it, over
    all tokens that are no padding. For the last block, h_{i+1} is its own output before the final norm.

    Args:
        model: A decoder in evaluation state.
        batches: Calibration text.
        progress: Told the fraction done after each batch.

    Returns:
        One score per block, from 0 (the block changes no direction) to 2.

    Reference:
        FedProxy, Eq. 4; ShortGPT (Men et al., arXiv 2403.03853), Eq. 1.
    """
    layers = blocks(model)
    sums = torch.zeros(len(layers), dtype=torch.float64)
    real = torch.empty(0, dtype=torch.bool)

    def observe(index: int) -> Callable[..., None]:
        def hook(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            sums[index] += cosine(entering[real], output[real]).sum().cpu()

        return hook

    handles = [layer.register_forward_hook(observe(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for done, batch in enumerate(batches, start=1):
            mask = batch.attention_mask.to(model.device)
            real = mask.bool()
            with torch.no_grad():
                model(input_ids=batch.input_ids.to(model.device), attention_mask=mask, use_cache=False)
            progress(done / len(batches))
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return [float(value) for value in 1 - sums / tokens]
