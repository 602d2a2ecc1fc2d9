"""One client's round for federations with a loop of their own: ClientUpdate of McMahan et al. 2017, on a proxy."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.config import Federate, Train
from fedproxy.data import read_rows
from fedproxy.errors import UsageError
from fedproxy.federation.client import answer
from fedproxy.federation.client_state import ClientState
from fedproxy.federation.messages import Order, Reply
from fedproxy.models.checkpoints import Tokenizer, padding
from fedproxy.models.encoding import training_examples
from fedproxy.models.families import readable
from fedproxy.models.lora import AdaptedModel, adapter_parameters, adapter_state, set_adapter_state
from fedproxy.tensors import Tensors


def client_update(
    model: AdaptedModel,
    rows: str | Path | Sequence[dict[str, Any]],
    adapter: Tensors,
    *,
    tokenizer: Tokenizer,
    train: Train,
    client: str,
    round: int,
    seed: int = 0,
    regulariser: str = "none",
    strength: float | None = None,
    conflict: Tensors | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Reply:
    """Train a client's round as the engines do, with the same bits, and return the update τ_k = φ_k − φ_t.

    Nothing is written. The model holds φ_t afterwards, whatever it held before, so that one model serves all clients.

    Args:
        model: The proxy with an adapter, from `attach_adapter` or PEFT; what of it requires gradients is trained.
        rows: The client's rows in TRL's formats, or a file of them as of `read_rows`.
        adapter: φ_t, the global adapter, named as PEFT's `get_peft_model_state_dict` names it.
        tokenizer: The LLM's.
        train: The settings of the training.
        client: The client's name; batch order and dropout depend on it, the round and the seed.
        round: The round, counted from 1.
        seed: The experiment's seed.
        regulariser: Its name; one that carries nothing from round to round, such as "fedprox" or "pcr".
        strength: Its strength; its own default if none.
        conflict: For "pcr", the conflict of the round before (Eq. 7), by name and shape as `adapter`; none at first.
        on_step: Told each optimizer step: its number, how many there are, the loss.

    Returns:
        `update` by name (float32, on the CPU); `rows`, `tokens`, `steps`; `loss`, the mean in nats per token;
        `seconds`, `peak_memory` (bytes).

    Raises:
        UsageError: there is no adapter to train, the training is to be private, or the regulariser keeps a state.
        ArtifactError: the rows cannot be used, or `adapter` does not fit the model; it is left as it was.
        DivergedError: the loss became NaN or infinite.

    Example:
        `client_update(model, rows, adapter, tokenizer=tokenizer, train=train, client="bank", round=1).update`
    """
    if (carried := REGULARISERS.choose(regulariser).carried) is not None:
        raise UsageError(
            f"The regulariser {regulariser!r} carries a state over rounds ({carried.name}): use `federate`."
        )
    if train.privacy is not None:
        raise UsageError("[train.privacy] holds for all rounds of a run and remembers what it spent: use `federate`.")
    if not isinstance(model, AdaptedModel) or not any(p.requires_grad for p in adapter_parameters(model).values()):
        raise UsageError(f"{type(model).__name__} has no adapter that can be trained: put one on with attach_adapter.")
    base: Any = model.get_base_model()
    longest = readable(base.config, train.max_length)
    examples = training_examples(read_rows(rows), tokenizer, train, longest)
    start = {name: tensor.detach().to("cpu", copy=True) for name, tensor in adapter.items()}
    try:
        return answer(
            Order(round, start, conflict),
            client,
            model,
            examples,
            train_settings=train,
            federate_settings=Federate(regulariser=regulariser, regulariser_strength=strength),
            pad=padding(tokenizer),
            seed=seed,
            state=ClientState(Path()),  # plain updates leave nothing to remember
            on_step=on_step,
        )
    finally:
        set_adapter_state(model, {**adapter_state(model), **start})
