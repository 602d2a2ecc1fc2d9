"""What the rounds of a federation ask of every client: steps, tokens, operations, bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedproxy.aggregation.merge import configured as merge_rule
from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.aggregation.space import SPACES
from fedproxy.config import Experiment
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.tuning import turns
from fedproxy.federation.wire import encoding, packed_bytes
from fedproxy.forecast.known import FLOAT, Known, ProxySize, Shapes, count
from fedproxy.models.costs import training
from fedproxy.models.encoding import Encoded
from fedproxy.models.training import optimizer_steps, trained_tokens
from fedproxy.seeds import derive_seed


@dataclass(frozen=True)
class ClientRound:
    """A round as one client has it.

    Attributes:
        round: Its number.
        steps: Optimizer steps.
        tokens: Tokens trained on.
        flops: Operations of training on them, and of training alone; those of scoring are not counted.
        bytes_up: What it sends; in the encoding top-k at most so much.
        bytes_down: What it gets, beside the proxy.
    """

    round: int
    steps: int
    tokens: int
    flops: float
    bytes_up: int
    bytes_down: int


def rounds_of(
    experiment: Experiment,
    known: Known,
    proxy: ProxySize,
    examples: Mapping[str, Sequence[Encoded]],
    *,
    aligned: int = 0,
) -> dict[str, list[ClientRound]]:
    """Go through the rounds, all clients answering.

    Args:
        experiment: The experiment.
        known: The LLM.
        proxy: Its proxy.
        examples: Every client's encoded rows.
        aligned: Bytes that each round but the first sends to align the proxy.

    Returns:
        For every client, sorted by name, the rounds that it is asked in.

    Raises:
        UsageError: [train] does not fit the proxy.
    """
    voters = Coordinator(examples, {}, experiment.federate).target
    found: dict[str, list[ClientRound]] = {}
    for name, asked in turns(experiment, examples).items():
        train, shapes, found[name] = experiment.train_of(name), _trained(experiment, name, known, proxy), []
        for number in asked:
            times = 1 + experiment.federate.alone
            tokens = trained_tokens(examples[name], train, derive_seed(experiment.seed, "train", number, name))
            found[name].append(
                ClientRound(
                    round=number,
                    steps=optimizer_steps(len(examples[name]), train),
                    tokens=tokens,
                    flops=times
                    * training(tokens, proxy.matrices, trained=proxy.trained(train), parameters=count(shapes)),
                    bytes_up=_up(experiment, shapes),
                    bytes_down=_down(experiment, shapes, number, voters) + (aligned if number > 1 else 0),
                )
            )
    return found


def _trained(experiment: Experiment, client: str, known: Known, proxy: ProxySize) -> Shapes:
    """The tensors that a client trains and sends."""
    shapes = known.adapter(proxy, experiment.train_of(client))
    return {name: shape for name, shape in shapes.items() if SPACES.choose(experiment.federate.space).trains(name)}


def _encoded(name: str, given: Mapping[str, object], shapes: Shapes, share: float) -> int:
    row, options = encoding(name, given)
    return sum(dtype.itemsize * elements for dtype, elements in row.layout(shapes, options, share=share).values())


def _up(experiment: Experiment, shapes: Shapes) -> int:
    settings = experiment.federate
    rule, options = merge_rule(settings.merge, settings.merge_options)
    return _encoded(settings.wire, settings.wire_options, shapes, rule.first(options))


def _down(experiment: Experiment, shapes: Shapes, number: int, voters: int) -> int:
    """The adapter, and the one to be scored; from the second round on conflict in bits, and the regulariser's state."""
    row = REGULARISERS.choose(experiment.federate.regulariser)
    found = _encoded(experiment.federate.wire_down, {}, shapes, 1.0) * (1 + (experiment.federate.validation > 0))
    if number > 1 and row.conflict:
        found += sum(packed_bytes(shape.numel(), voters.bit_length()) for shape in shapes.values())
    if number > 1 and row.carried:
        found += FLOAT * count(shapes)
    return found
