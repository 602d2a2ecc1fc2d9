"""What a client does in a round: train the proxy's adapter on its own rows, return the difference."""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from fedproxy.aggregation.regularise import SCAFFOLD, penalty
from fedproxy.aggregation.regularise.scaffold import client_variate, drift
from fedproxy.config import Federate, Train
from fedproxy.federation.client_state import ClientState, Memory
from fedproxy.federation.messages import Order, Reply, size_in_bytes
from fedproxy.federation.parcel import PLAIN, wrap_update
from fedproxy.models.encoding import Encoded
from fedproxy.models.lora import AdaptedModel, adapter_parameters, adapter_state, set_adapter_state
from fedproxy.models.training import Penalty, train
from fedproxy.seeds import derive_seed
from fedproxy.tensors import Tensors

log = logging.getLogger(__name__)

STRENGTH = {"fedprox": 0.01, "pcr": 1e-5}
"""Strength of each regulariser unless the experiment gives one: μ = 0.01 (Li et al. 2020), λ = 1e-5 (FedProxy)."""


def regularisation(settings: Federate, order: Order, device: torch.device) -> Penalty | None:
    """The term a client adds to its loss in the round of `order`; none if it would be zero throughout."""
    name, given = settings.regulariser, settings.regulariser_strength
    if name in ("none", SCAFFOLD) or given == 0 or (name == "pcr" and order.conflict is None):
        return None
    strength = STRENGTH[name] if given is None else given
    term = penalty(name)
    anchor = {key: tensor.to(device) for key, tensor in order.adapter.items()}
    conflict = {key: tensor.to(device) for key, tensor in (order.conflict or {}).items()} or None

    def added(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return term(parameters, anchor, conflict, strength)

    return added


def _take(order: Order, model: AdaptedModel) -> None:
    """Put the order's adapter into the model; tensors that are not trained keep their values."""
    frozen = {name: tensor for name, tensor in adapter_parameters(model).items() if not tensor.requires_grad}
    set_adapter_state(model, {**frozen, **order.adapter})


def _recall(state: ClientState, since: int, name: str, settings: Federate) -> Memory:
    """What the client knows of round `since`; what is gone of it is told, and begins at zero."""
    memory = state.before(since)
    gone = ["what the wire lost so far"] * (settings.wire != PLAIN and memory.residual is None)
    gone += ["its control variate"] * (settings.regulariser == SCAFFOLD and memory.control is None)
    if since and gone:
        log.warning("%s no longer has %s, as it was after round %d: zero again.", name, " and ".join(gone), since)
    return memory


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
    state: ClientState,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Reply:
    """Train `model` (a proxy with an adapter attached) as `order` says, and reply.

    What the wire loses of the update is kept and added to the next one (error feedback). With SCAFFOLD the steps are
    corrected by c − c_k, and c_k becomes the mean direction of this round's steps. Both go on from the last update
    that counted.

    Args:
        order: The round's adapter and conflict.
        name: The client's name; batch order and dropout depend on it, the round and the seed alone.
        model: The proxy; its adapter's values are overwritten.
        examples: The client's encoded rows.
        train_settings: The [train] table.
        federate_settings: The [federate] table (regulariser, space, wire).
        pad: Padding token id.
        seed: The experiment's seed.
        state: What the client remembers from earlier rounds.
        on_step: Called after each optimizer step with (step, steps, loss).

    Raises:
        DivergedError: the loss became NaN or infinite.
        ArtifactError: the order does not fit the model, or the client's state is damaged.
    """
    memory, scaffold = _recall(state, order.since, name, federate_settings), federate_settings.regulariser == SCAFFOLD
    _take(order, model)
    device = next(model.parameters()).device
    done = train(
        model,
        examples,
        train_settings,
        pad=pad,
        seed=derive_seed(seed, "train", order.round, name),
        penalty=regularisation(federate_settings, order, device),
        drift=(drift(order.control, memory.control) or None) if scaffold else None,
        on_step=on_step,
    )
    trained = adapter_state(model)
    update: Tensors = {key: trained[key] - tensor for key, tensor in order.adapter.items()}
    parcel, residual = None, None
    if federate_settings.wire != PLAIN:
        parcel, update, residual = wrap_update(
            update,
            memory.residual,
            federate_settings.wire,
            federate_settings.wire_options,
            seed=derive_seed(seed, "wire", order.round, name),
            share=order.share,
        )
    control = client_variate(memory.control, order.control, update, done.rate_sum) if scaffold else None
    state.after(order.round, order.since, Memory(residual, control))
    return Reply(
        client=name,
        round=order.round,
        update=update,
        rows=len(examples),
        tokens=done.tokens,
        steps=len(done.losses),
        loss=done.loss,
        seconds=done.seconds,
        rate_sum=done.rate_sum,
        peak_memory=done.peak_memory,
        wire=federate_settings.wire,
        size=size_in_bytes(parcel.parts if parcel else update),
        parcel=parcel,
    )
