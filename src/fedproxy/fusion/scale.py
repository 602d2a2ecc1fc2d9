"""The scale of the task vector by loss on public text: one walk over the blocks for a whole grid of scales."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedproxy.adapter_checks import parameter_name
from fedproxy.checkpoint_files import split_number
from fedproxy.errors import ArtifactError
from fedproxy.fusion.plug_in import TaskVector
from fedproxy.models.block_stream import BlockStream
from fedproxy.models.families import blocks_path
from fedproxy.models.loading import restored
from fedproxy.models.task_vector import changed, changes
from fedproxy.models.text_batches import Batch

GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""The scales that are tried; 0 is the LLM itself, and only a reference."""


def scale_curve(
    stream: BlockStream,
    vector: TaskVector,
    config: Mapping[str, Any],
    batches: Sequence[Batch],
    *,
    scales: Sequence[float] = GRID,
    on_block: Callable[[int], None] = lambda number: None,
) -> list[tuple[float, float]]:
    """Mean loss of the fused LLM on public text, for several scales of the task vector.

    For each block and each scale, W + scale * alpha / r * B A is put in place, the hidden states of that scale are run
    through, and W is put back. So every weight is read once, and one block and its changed copy are in memory.

    Args:
        stream: The LLM's text decoder.
        vector: The task vector.
        config: PEFT configuration of the adapter.
        batches: The text.
        scales: Factors of the task vector.
        on_block: Told each block that is done.

    Returns:
        For each scale, the mean of -log p(token | tokens before it) over all tokens, in nats; infinite if it overflows.

    Raises:
        ArtifactError: the text has no token to predict.
    """
    inside: dict[int, list[str]] = {}
    outside: list[str] = []
    path = blocks_path(stream.model)
    for name in vector.tensors:
        parts = split_number(parameter_name(name))
        (inside.setdefault(parts[1], []) if parts is not None and parts[0] == path else outside).append(name)

    def at(scale: float, names: Sequence[str]) -> contextlib.AbstractContextManager[None]:
        return _changed(stream.model, vector.at(scale, names), config)

    passages = [stream.enter(batch.input_ids, batch.attention_mask) for batch in batches]
    shared = [passage.hidden for passage in passages]
    states: dict[float, list[torch.Tensor]] = {}
    if outside:
        for scale in scales:
            with at(scale, outside):
                entering = (stream.enter(batch.input_ids, batch.attention_mask).hidden for batch in batches)
                states[scale] = stream.carried(entering)
    for number, _ in stream.walk():
        names = inside.get(number, [])
        if not states and not names:
            shared = [stream.run(number, passage, hidden) for passage, hidden in zip(passages, shared, strict=True)]
        elif not states:
            states = {scale: stream.carried(shared) for scale in scales}
            shared = []
        for scale, hidden in states.items():
            with at(scale, names):
                for passage, state in zip(passages, hidden, strict=True):
                    state.copy_(stream.run(number, passage, state))
        on_block(number)
    curve = []
    for scale in scales:
        total, count = 0.0, 0
        with at(scale, outside):
            for passage, state in zip(passages, states[scale], strict=True):
                loss, tokens = stream.losses(passage, state)
                total, count = total + loss, count + tokens
        if count == 0:
            raise ArtifactError("the public text has no token to predict. Give texts of two tokens or more.")
        curve.append((scale, total / count if math.isfinite(total) else math.inf))
    return curve


@contextlib.contextmanager
def _changed(model: nn.Module, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Iterator[None]:
    """Keep the weights of `model` as an adapter changes them while the context lasts."""
    with restored(model):
        for name, change in changes(tensors, config).items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            weight = changed(module.get_parameter(leaf).detach(), change)
            module._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
        yield


def best_scale(curve: Sequence[tuple[float, float]]) -> float:
    """The scale above 0 with the lowest loss; of equal ones the smallest.

    Raises:
        ArtifactError: no loss is finite.
    """
    loss, scale = min((loss, scale) for scale, loss in curve if scale > 0)
    if not math.isfinite(loss):
        raise ArtifactError("the fused LLM's loss on the public text is not finite at any scale.")
    return scale
