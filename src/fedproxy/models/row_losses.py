"""The loss of each row by itself."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fedproxy.models.encoding import Encoded
from fedproxy.models.label_loss import predicted
from fedproxy.models.layouts import collate
from fedproxy.models.lora import AdaptedModel


@torch.no_grad()
def row_losses(model: AdaptedModel, examples: Sequence[Encoded], *, pad: int, batch_size: int) -> list[float]:
    """Cross-entropy of each row's tokens that count, summed, in nats; the model is in evaluation state afterwards.

    Args:
        model: A model with an adapter.
        examples: The rows.
        pad: Padding token id.
        batch_size: Rows in a forward pass.

    Returns:
        A sum for each row, in the rows' order.
    """
    device = next(model.parameters()).device
    model.eval()
    found = [0.0] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        batch = {name: t.to(device) for name, t in collate([examples[i] for i in chosen], pad).items()}
        logits, labels, counts = predicted(model, batch)
        losses = F.cross_entropy(logits, labels, reduction="none").double()
        rows = counts.nonzero()[:, 0]
        sums = torch.zeros(len(chosen), dtype=torch.float64, device=device).index_add_(0, rows, losses)
        for place, total in zip(chosen, sums.tolist(), strict=True):
            found[place] = total
    return found
