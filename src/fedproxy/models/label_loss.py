"""The loss of what counts, with the head applied to nothing else."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedproxy.models.layouts import IGNORED
from fedproxy.models.lora import AdaptedModel


@contextlib.contextmanager
def head_only_at(head: nn.Module, where: torch.Tensor) -> Iterator[None]:
    """Let the head of a model see some positions alone.

    What a family does to the logits afterwards (a cap, a scale) stays its own.

    Args:
        head: The model's output embeddings; they turn [rows, tokens, width] into logits.
        where: The positions, [rows, tokens] of truth values; the logits become [1, positions, vocabulary].
    """

    def select(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][where][None], *inputs[1:])

    with head.register_forward_pre_hook(select):
        yield


def summed_loss(model: AdaptedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the labels, summed over those that count, in float32.

    Args:
        model: The model, on the device of the batch.
        batch: `input_ids`, `labels` and what else a layout makes, all [rows, tokens].
    """
    logits, labels, _ = predicted(model, batch)
    return F.cross_entropy(logits, labels, reduction="sum")


def row_means(model: AdaptedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Each row's cross-entropy, the mean over its labels that count, summed over the rows, in float32.

    The arguments are as of `summed_loss`; every row has a label that counts.
    """
    logits, labels, counts = predicted(model, batch)
    weights = (1 / counts.sum(1, keepdim=True)).expand(counts.shape)[counts]
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


def predicted(
    model: AdaptedModel, batch: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a batch has the model predict; the arguments are as of `summed_loss`.

    Returns:
        The logits of what counts, float32 [positions, vocabulary]; its labels, [positions]; and where in the batch it
        counts, truth values [rows, tokens].
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    ahead = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    counts = ahead != IGNORED
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    with contextlib.nullcontext() if head is None else head_only_at(head, counts):
        logits = model(**inputs, use_cache=False).logits
    if logits.shape[:2] == counts.shape:  # of a model that does not call its head as a module
        logits = logits[counts]
    return logits.flatten(0, -2).float(), ahead[counts], counts
