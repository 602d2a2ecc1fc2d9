"""A model made ready for training: loaded as its device likes it, with a fresh adapter."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedproxy.config import Train
from fedproxy.errors import ResourceError
from fedproxy.layer_map import trained_blocks
from fedproxy.models.checkpoints import Model, load_model
from fedproxy.models.families import blocks, check_plain
from fedproxy.models.lora import AdaptedModel, attach
from fedproxy.models.parallel import Load, Team, team
from fedproxy.models.quantization import four_bit, keep_gradients
from fedproxy.seeds import derive_seed


def load_trainable(path: Path, settings: Train, *, seed: int, trust_remote_code: bool = False) -> AdaptedModel:
    """Load a checkpoint with the adapter of [train], in every process of the team if this one leads one.

    The arguments, and what is raised, are those of `load_alone`; beside it

    Raises:
        ResourceError: another process could not load it.
    """
    arguments: dict[str, Any] = {"path": path, "settings": settings}
    arguments |= {"seed": seed, "trust_remote_code": trust_remote_code}
    leading = team()
    if leading is None:
        return load_alone(**arguments)
    leading.give([Load(arguments)] * leading.size)
    return load_share(leading, arguments)


def load_share(team: Team, arguments: Mapping[str, Any]) -> AdaptedModel:
    """Load in this process of a team, while the others do; what is raised is as of `load_trainable`."""
    try:
        model = load_alone(**arguments)
    except BaseException as error:
        with contextlib.suppress(ResourceError):
            team.loaded(None, f"{type(error).__name__}: {error}")
        raise
    team.loaded(model, None)
    return model


def load_alone(path: Path, settings: Train, *, seed: int, trust_remote_code: bool = False) -> AdaptedModel:
    """Load a checkpoint and put the adapter of [train] on it: in its own dtype on a GPU, in float32 on a CPU.

    On a CPU float32 weights with bf16 autocast are faster than bf16 weights. With quantization = "4bit" the weights of
    linear layers other than the head take four bits on either. The adapter's first values depend on the seed alone.

    Raises:
        ArtifactError: the checkpoint cannot be used.
        UsageError: the adapter's settings do not fit it, or it cannot be quantised here.
    """
    narrow = settings.precision != "fp32" and torch.cuda.is_available()
    model = load_model(
        path,
        dtype=None if narrow else torch.float32,
        quantization=four_bit() if settings.quantization == "4bit" else None,
        trust_remote_code=trust_remote_code,
    )
    return attach_adapter(model, settings, seed=seed)


def attach_adapter(model: Model, train: Train, *, seed: int = 0) -> AdaptedModel:
    """Put a fresh LoRA adapter on a model in memory, which PEFT changes in place; all else is frozen.

    Args:
        model: The proxy, in the data type that it is to be trained in.
        train: What the adapter is: lora_r, lora_alpha, lora_dropout, lora_targets, blocks.
        seed: The experiment's seed; the adapter's first values depend on it alone.

    Returns:
        PEFT's model, to train with `client_update`.

    Raises:
        ArtifactError: the model has no blocks that can be found.
        UsageError: it has an adapter already, or the settings do not fit it.

    Example:
        `attach_adapter(proxy.model, Train(lora_r=8, lora_alpha=16))`
    """
    check_plain(model)
    keep_gradients(model)
    return attach(
        model,
        r=train.lora_r,
        alpha=train.lora_alpha,
        dropout=train.lora_dropout,
        targets=train.lora_targets,
        layers=trained_blocks(train.blocks, len(blocks(model))),
        seed=derive_seed(seed, "adapter"),
    )
