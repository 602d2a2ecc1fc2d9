"""Whether an experiment fits its LLM: what its configuration and tokenizer tell before a weight is read."""

from collections.abc import Mapping

from fedproxy.compression.heal import check_healing
from fedproxy.compression.realign import emulator_blocks
from fedproxy.compression.select import between, removed_count
from fedproxy.config import Experiment
from fedproxy.errors import UsageError
from fedproxy.federation.client_rows import ClientRows, encode_for
from fedproxy.layer_map import trained_blocks
from fedproxy.models.checkpoints import Model
from fedproxy.models.families import blocks
from fedproxy.models.lora import target_names
from fedproxy.models.shape import open_shape
from fedproxy.models.training import optimizer_steps
from fedproxy.privacy.plan import Plan


def check_compression(experiment: Experiment, decoder: Model) -> int:
    """Check that [compress] and [heal] fit an LLM.

    Args:
        experiment: The experiment.
        decoder: The LLM's text decoder, which may be on the meta device.

    Returns:
        How many blocks the proxy will have.

    Raises:
        UsageError: the blocks kept in any case leave too few to remove, or none to heal.
    """
    compress, heal, count = experiment.compress, experiment.heal, len(blocks(decoder))
    removed = removed_count(count, compress.remove)
    free = len(between(count, compress.keep_first, compress.keep_last, removed)) - removed
    left = count - removed
    if heal.steps or (heal.refit and removed):
        check_healing(heal, range(free if heal.spare_ends else left))
    return left


def check_fit(experiment: Experiment, decoder: Model) -> None:
    """Check that [compress], [heal] and [train] fit an LLM; the arguments are those of `check_compression`.

    Raises:
        UsageError: as of `check_compression`; or a block that is trained or a LoRA target does not exist, or clients
            train all blocks or with several ranks where [heal] realign_steps aligns the others.
    """
    left, train = check_compression(experiment, decoder), experiment.train
    owned = trained_blocks(train.blocks, left)
    target_names(decoder, train.lora_targets)
    if experiment.heal.realign_steps:
        emulator_blocks(left, owned)
        if experiment.ranks:
            raise UsageError("[heal] realign_steps needs one rank for all clients: leave lora_r out of [[client]].")


def check_experiment(experiment: Experiment, rows: ClientRows) -> None:
    """Check that an experiment fits its LLM, that the tokenizer can render the clients' rows, and the clients' budgets.

    Args:
        experiment: The experiment.
        rows: The clients' rows, as far as they are here.

    Raises:
        ArtifactError: the LLM is none, or of a sort that can be neither compressed nor fused; or as of `encode`.
        UsageError: as of `check_fit`, `encode` and `private_plans`.
    """
    shape = open_shape(experiment.llm.path, trust_remote_code=experiment.llm.trust_remote_code)
    check_fit(experiment, shape.decoder)
    encoded = encode_for(shape.path, rows, experiment)[1]
    private_plans(experiment, {name: len(examples) for name, examples in encoded.items()})


def private_plans(experiment: Experiment, rows: Mapping[str, int]) -> dict[str, Plan]:
    """What [train.privacy] makes of clients with so many rows each; nothing without.

    Raises:
        UsageError: as of `Plan.of`, with the client's name.
    """
    found = {}
    for name, count in rows.items():
        train, rounds = experiment.train_of(name), experiment.federate.rounds
        if train.privacy is not None:
            steps = optimizer_steps(count, train)
            try:
                found[name] = Plan.of(train.privacy, train, rows=count, steps=steps, rounds=rounds)
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from error
    return found
