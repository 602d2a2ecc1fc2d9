"""What a client does in a round: train the proxy's adapter on its own rows, return the difference."""

import logging
from collections.abc import Callable, Sequence

from fedproxy.aggregation.regularise import REGULARISERS, Carried
from fedproxy.config import Federate, Train
from fedproxy.federation.client_state import ClientState, Memory
from fedproxy.federation.messages import Order, Reply, size_in_bytes
from fedproxy.federation.parcel import wrap_update
from fedproxy.federation.wire import ENCODINGS
from fedproxy.models.encoding import Encoded
from fedproxy.models.lora import AdaptedModel, adapter_parameters, adapter_state, set_adapter_state
from fedproxy.models.private_training import Private
from fedproxy.models.training import DivergedError, Training, optimizer_steps, train
from fedproxy.privacy.releases import Outcome, Releases
from fedproxy.seeds import derive_seed
from fedproxy.tensors import Tensors

log = logging.getLogger(__name__)


def take(adapter: Tensors, model: AdaptedModel) -> None:
    """Put an order's adapter into the model; tensors that are not trained keep their values."""
    frozen = {name: tensor for name, tensor in adapter_parameters(model).items() if not tensor.requires_grad}
    set_adapter_state(model, {**frozen, **adapter})


def _recall(state: ClientState, since: int, name: str, loses: bool, carried: Carried | None) -> Memory:
    """What the client knows of round `since`; what is gone of it is told, and begins at zero."""
    memory = state.before(since)
    gone = ["what the wire lost so far"] if loses and memory.residual is None else []
    gone += [f"its {carried.name}"] if carried and memory.state is None else []
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
    releases: Releases | None = None,
) -> Reply:
    """Train `model` (a proxy with an adapter attached) as `order` says, and reply.

    What the wire loses of the update is kept and added to the next one (error feedback), and what the regulariser
    carries corrects the steps. Both go on from the last update that counted.

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
        releases: What it gave away so far, under [train.privacy]: then nothing but the update follows from its rows,
            and an order that was answered before is answered alike.

    Raises:
        DivergedError: the loss became NaN or infinite.
        OverspentError: the privacy budget forbids it.
        ArtifactError: the order does not fit the model, or the client's state is damaged.
    """
    wire, row = federate_settings.wire, REGULARISERS.choose(federate_settings.regulariser)
    carried = row.carried
    memory = _recall(state, order.since, name, ENCODINGS.choose(wire).loses, carried)
    take(order.adapter, model)
    device = next(model.parameters()).device
    done: Training | None = None

    def learn(private: Private | None = None) -> Outcome:
        nonlocal done
        found = train(
            model,
            examples,
            train_settings,
            pad=pad,
            seed=derive_seed(seed, "train", order.round, name),
            penalty=row.term(order.adapter, order.conflict, federate_settings.regulariser_strength, device),
            drift=(carried.drift(order.state, memory.state) or None) if carried else None,
            on_step=on_step,
            private=private,
        )
        done = found if private is None else None
        told = ("seconds", *(carried.numbers if carried else ()))
        return Outcome(adapter_state(model), {key: float(getattr(found, key)) for key in told})

    if releases is None:
        outcome, steps = learn(), optimizer_steps(len(examples), train_settings)
    else:
        private = Private(releases.plan)
        outcome, steps = releases.outcome(order.round, order.adapter, lambda: learn(private)), releases.plan.steps
    trained = outcome.adapter
    update: Tensors = {key: trained[key] - tensor for key, tensor in order.adapter.items()}
    parcel, update, residual = wrap_update(
        update,
        memory.residual,
        wire,
        federate_settings.wire_options,
        seed=derive_seed(seed, "wire", order.round, name),
        share=order.share,
    )
    reply = Reply(
        client=name,
        round=order.round,
        update=update,
        rows=len(examples),
        tokens=done.tokens if done else 0,
        steps=steps,
        loss=done.loss if done else None,
        seconds=outcome.numbers["seconds"],
        numbers={key: outcome.numbers[key] for key in (carried.numbers if carried else ())},
        peak_memory=done.peak_memory if done else 0,
        epsilon=releases.spent if releases else None,
        wire=wire,
        size=size_in_bytes(parcel.parts if parcel else update),
        parcel=parcel,
    )
    own = carried.client(memory.state, order.state, reply) if carried else None
    state.after(order.round, order.since, Memory(residual, own))
    return reply


def train_alone(
    order: Order,
    name: str,
    model: AdaptedModel,
    examples: Sequence[Encoded],
    *,
    start: Tensors,
    train_settings: Train,
    pad: int,
    seed: int,
    state: ClientState,
    on_step: Callable[[int, int, float], None] | None = None,
) -> bool:
    """Train what the client would have without the others: its own adapter, by as many steps on the same batches.

    It goes on from where it was after the last round whose update counted, so that both trainings took as many steps.

    Args:
        order: The order of the round; its adapter is not looked at.
        name: The client's name.
        model: The proxy; its adapter's values are overwritten, and are afterwards those trained alone.
        examples: The client's encoded rows.
        start: The adapter that the run began with, as far as it is trained.
        train_settings: The [train] table.
        pad: Padding token id.
        seed: The experiment's seed.
        state: Where the adapter is kept from round to round.
        on_step: As of `answer`.

    Returns:
        Whether there is such an adapter: not once a training diverged or what was kept is gone.

    Raises:
        ArtifactError: what was kept is damaged.
    """
    adapter = state.before(order.since).state if order.since else start
    if adapter is None:
        log.warning("%s no longer has what it trained alone until round %d.", name, order.since)
        return False
    take(adapter, model)
    try:
        train(
            model,
            examples,
            train_settings,
            pad=pad,
            seed=derive_seed(seed, "train", order.round, name),
            on_step=on_step,
        )
    except DivergedError as error:
        log.warning("What %s trains alone diverged: %s", name, error)
        return False
    trained = adapter_state(model)
    state.after(order.round, order.since, Memory(state={key: trained[key] for key in start}))
    return True
