"""What a client does in a round: train the proxy's adapter on its own rows, return the difference."""

from collections.abc import Callable, Mapping, Sequence

import torch

from fedproxy.config import Federate, Train
from fedproxy.federation.messages import Order, Reply
from fedproxy.federation.regularise import penalty
from fedproxy.models.encoding import Encoded
from fedproxy.models.lora import AdaptedModel, adapter_state, set_adapter_state
from fedproxy.models.training import Penalty, train
from fedproxy.seeds import derive_seed

STRENGTH = {"fedprox": 0.01, "pcr": 1e-5}
"""Strength of each regulariser unless the experiment gives one: μ = 0.01 (Li et al. 2020), λ = 1e-5 (FedProxy)."""


def regularisation(settings: Federate, order: Order, device: torch.device) -> Penalty | None:
    """The term a client adds to its loss in the round of `order`; none if it would be zero throughout."""
    name, given = settings.regulariser, settings.regulariser_strength
    if name == "none" or given == 0 or (name == "pcr" and order.conflict is None):
        return None
    strength = STRENGTH[name] if given is None else given
    term = penalty(name)
    anchor = {key: tensor.to(device) for key, tensor in order.adapter.items()}
    conflict = {key: tensor.to(device) for key, tensor in (order.conflict or {}).items()} or None

    def added(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return term(parameters, anchor, conflict, strength)

    return added


def answer(
    order: Order,
    name: str,
    model: AdaptedModel,
    examples: Sequence[Encoded],
    *,
    train_settings: Train,
    federate_settings: Federate,
    pad: int,
    seed: int,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Reply:
    """Train `model` (a proxy with an adapter attached) as `order` says, and reply.

    Args:
        order: The round's adapter and conflict.
        name: The client's name; batch order and dropout depend on it, the round and the seed alone.
        model: The proxy; its adapter's values are overwritten.
        examples: The client's encoded rows.
        train_settings: The [train] table.
        federate_settings: The [federate] table (regulariser).
        pad: Padding token id.
        seed: The experiment's seed.
        on_step: Called after each optimizer step with (step, steps, loss).

    Raises:
        FedproxyError: the loss became NaN or infinite.
    """
    set_adapter_state(model, order.adapter)
    device = next(model.parameters()).device
    done = train(
        model,
        examples,
        train_settings,
        pad=pad,
        seed=derive_seed(seed, "train", order.round, name),
        penalty=regularisation(federate_settings, order, device),
        on_step=on_step,
    )
    update = {key: tensor - order.adapter[key] for key, tensor in adapter_state(model).items()}
    return Reply(
        client=name,
        round=order.round,
        update=update,
        rows=len(examples),
        tokens=done.tokens,
        steps=len(done.losses),
        loss=done.loss,
        seconds=done.seconds,
    )
