"""How the sequences of a batch lie in rows of tokens: one a row and padded, or several a row and (nearly) without.

Both hold the same examples and the same labels, and the loss is the same up to rounding.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fedproxy.models.encoding import Encoded
from fedproxy.models.lora import AdaptedModel

IGNORED = -100
"""The label of what does not count in the loss."""
Layout = Callable[[Sequence[Encoded], int], dict[str, torch.Tensor]]
"""Examples and padding token id → the model's inputs, and `labels`, all [rows, tokens]."""

_ROUNDING, _COARSE_ROUNDING = 1e-3, 0.05
"""Difference of logits that rounding explains, relative to their size: in float32, and in narrower numbers."""

_log = logging.getLogger(__name__)


def collate(examples: Sequence[Encoded], pad: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right: `input_ids`, `attention_mask`, `labels`, each [examples, longest]."""
    batch = _laid([[example] for example in examples], pad)
    lengths = torch.tensor([len(example.ids) for example in examples])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    del batch["position_ids"]
    return batch


def pack(examples: Sequence[Encoded], pad: int) -> dict[str, torch.Tensor]:
    """Lay examples one behind the other into rows as long as the longest, each behind the last that leaves room.

    Positions start anew at each example, and at the padding that fills a row; transformers lets no attention cross
    such a start where it is given no mask.

    Returns:
        `input_ids`, `position_ids`, `labels`, each [rows, longest].
    """
    return _laid([[examples[i] for i in row] for row in first_fit([len(example.ids) for example in examples])], pad)


def first_fit(lengths: Sequence[int]) -> list[list[int]]:
    """Pack lengths into bins as large as the largest length: first fit, the longest first.

    Returns:
        The numbers of the lengths in each bin. There are at most 11/9 of the fewest possible, plus 6/9.

    Reference:
        Dósa, "The tight bound of first fit decreasing bin-packing algorithm", ESCAPE 2007.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = next((row for row, left in enumerate(room) if left >= lengths[i]), None)
        if fits is None:
            rows.append([i])
            room.append(max(lengths) - lengths[i])
        else:
            rows[fits].append(i)
            room[fits] -= lengths[i]
    return rows


def _laid(rows: Sequence[Sequence[Encoded]], pad: int) -> dict[str, torch.Tensor]:
    shape = (len(rows), max(sum(len(example.ids) for example in row) for row in rows))
    ids, labels, positions = np.full(shape, pad), np.full(shape, IGNORED), np.empty(shape, dtype=np.int64)
    count = np.arange(shape[1])
    for number, row in enumerate(rows):
        begin = 0
        for example in row:
            end = begin + len(example.ids)
            ids[number, begin:end] = example.ids
            labels[number, begin + example.start : end] = example.ids[example.start :]
            for first, behind in example.gaps:
                labels[number, begin + first : begin + behind] = IGNORED
            positions[number, begin:end] = count[: end - begin]
            begin = end
        positions[number, begin:] = count[: shape[1] - begin]
    tensors = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.from_numpy(values) for name, values in tensors.items()}


def layout_for(model: AdaptedModel, padding_free: bool) -> Layout:
    """The layout that `model` is trained with: `pack` where it is wanted and the model keeps sequences apart."""
    apart = keeps_apart(model) if padding_free else None
    if apart is False:
        _log.info("%s does not keep packed sequences apart; batches are padded.", type(model.get_base_model()).__name__)
    return pack if apart else collate


@torch.no_grad()
def keeps_apart(model: AdaptedModel) -> bool | None:
    """Try whether `model` computes for sequences that share a row what it computes for each alone.

    Three sequences in two rows are compared with the same ones padded, by the mean difference of their logits. A
    model that takes no positions, or overlooks where they start anew, is found out. Weights that exploded tell nothing:
    then the answer is none.
    """
    base: Any = model.get_base_model()
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return False
    vocabulary, device = base.get_input_embeddings().num_embeddings, next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    three = [Encoded(torch.randint(vocabulary, (n,), generator=generator).tolist(), 1) for n in (9, 5, 4)]
    training = model.training
    model.eval()
    packed, alone = (_logits(model, layout(three, 0), device) for layout in (pack, collate))
    model.train(training)
    apart = (packed - alone).abs().mean() / (alone - alone.mean()).abs().mean()
    fine = base.dtype.itemsize >= 4 and not getattr(base, "is_quantized", False)
    return bool(apart < (_ROUNDING if fine else _COARSE_ROUNDING)) if apart.isfinite() else None


def _logits(model: AdaptedModel, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Logits of what predicts a label, in the order of the labels' sequences by falling length."""
    labels = batch.pop("labels")
    logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).logits
    found: torch.Tensor = logits[:, :-1][(labels[:, 1:] != IGNORED).to(device)].float()
    return found
