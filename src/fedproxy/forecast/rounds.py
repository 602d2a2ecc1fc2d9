"""What the rounds of a federation ask of every client: steps, tokens, operations, bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedproxy.aggregation.merge import configured as merge_rule
from fedproxy.aggregation.regularise import REGULARISERS
from fedproxy.aggregation.space import SPACES
from fedproxy.config import Experiment
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.secure.form import Form
from fedproxy.federation.turns import turns
from fedproxy.federation.wire import encoding, packed_bytes
from fedproxy.forecast.known import FLOAT, Known, ProxySize, Shapes, count
from fedproxy.models.costs import Matrices, reading, training
from fedproxy.models.encoding import Encoded
from fedproxy.models.training import optimizer_steps, trained_tokens
from fedproxy.models.validating import Validation
from fedproxy.seeds import derive_seed


@dataclass(frozen=True)
class ClientRound:
    """A round as one client has it.

    Attributes:
        round: Its number.
        steps: Optimizer steps.
        tokens: Tokens trained on.
        flops: Operations of training on them.
        scoring_flops: Operations of what [federate] validation adds: of the passes over the rows that are kept back,
            and of training alone.
        bytes_up: What it sends; in the encoding top-k at most so much, with secure sums beside keys and signatures.
        bytes_down: What it gets, beside the proxy, and these.
    """

    round: int
    steps: int
    tokens: int
    flops: float
    scoring_flops: float
    bytes_up: int
    bytes_down: int


def rounds_of(
    experiment: Experiment,
    known: Known,
    proxy: ProxySize,
    examples: Mapping[str, Sequence[Encoded]],
    validations: Mapping[str, Validation],
    *,
    aligned: int = 0,
) -> dict[str, list[ClientRound]]:
    """Go through the rounds, all clients answering.

    Args:
        experiment: The experiment.
        known: The LLM.
        proxy: Its proxy.
        examples: Every client's encoded rows.
        validations: The rows that clients score on; none of a client that gives no scores.
        aligned: Bytes that each round but the first sends to align the proxy.

    Returns:
        For every client, sorted by name, the rounds that it is asked in.

    Raises:
        UsageError: [train] does not fit the proxy.
    """
    voters = Coordinator(examples, {}, experiment.federate).target
    found: dict[str, list[ClientRound]] = {}
    for name, asked in turns(experiment, examples).items():
        train, shapes, found[name] = experiment.train_of(name), trained_shapes(experiment, name, known, proxy), []
        scored = validations.get(name)
        for number in asked:
            tokens = trained_tokens(examples[name], train, derive_seed(experiment.seed, "train", number, name))
            flops = training(tokens, proxy.matrices, trained=proxy.trained(train), parameters=count(shapes))
            scoring = 0.0
            if scored is not None:
                alone, passed = experiment.federate.alone, known.passed("proxy_tuned", proxy, train)
                scoring = scoring_flops(
                    scored.tokens, passed, proxy.matrices, untuned=number == asked[0], alone=flops if alone else None
                )
            found[name].append(
                ClientRound(
                    round=number,
                    steps=optimizer_steps(len(examples[name]), train),
                    tokens=tokens,
                    flops=flops,
                    scoring_flops=scoring,
                    bytes_up=_up(experiment, shapes),
                    bytes_down=_down(experiment, shapes, number, voters, scored is not None)
                    + (aligned if number > 1 else 0),
                )
            )
    return found


def scoring_flops(tokens: int, passed: int, proxy: Matrices, *, untuned: bool, alone: float | None) -> float:
    """Operations of what a client's scores of a round take.

    The round's adapter and the client's own update are scored, 2 (N + P) a token each; in its first round the untuned
    proxy, 2 N; and what it trains alone, which takes as many steps on the same batches as its part of the round.

    Args:
        tokens: Tokens that one score reads.
        passed: N + P, entries of the matrices of proxy and adapter.
        proxy: Those of the proxy.
        untuned: Whether the untuned proxy is scored.
        alone: Operations of a training; none if the client does not train alone.

    Example:
        >>> scoring_flops(10, 260, Matrices([100, 100], head=50), untuned=True, alone=1000.0)
        21600.0
    """
    scores = 2 + (alone is not None)
    return 2.0 * passed * tokens * scores + reading(tokens, proxy) * untuned + (alone or 0.0)


def trained_shapes(experiment: Experiment, client: str, known: Known, proxy: ProxySize) -> Shapes:
    """The tensors that a client trains and sends.

    Raises:
        UsageError: [train] does not fit the proxy.
    """
    shapes = known.adapter(proxy, experiment.train_of(client))
    return {name: shape for name, shape in shapes.items() if SPACES.choose(experiment.federate.space).trains(name)}


def _encoded(name: str, given: Mapping[str, object], shapes: Shapes, share: float) -> int:
    row, options = encoding(name, given)
    return sum(dtype.itemsize * elements for dtype, elements in row.layout(shapes, options, share=share).values())


def _up(experiment: Experiment, shapes: Shapes) -> int:
    settings = experiment.federate
    rule, options = merge_rule(settings.merge, settings.merge_options)
    vectors = 1
    if settings.secure:
        form = Form.of(settings)
        vectors = sum(form.words(label, 1) for label in form.labels)
    return _encoded(settings.wire, settings.wire_options, shapes, rule.first(options)) * vectors


def _down(experiment: Experiment, shapes: Shapes, number: int, voters: int, scores: bool) -> int:
    """The adapter, and the merged one to be scored; from round two on conflict and state; counts of signs."""
    row = REGULARISERS.choose(experiment.federate.regulariser)
    found = _encoded(experiment.federate.wire_down, {}, shapes, 1.0) * (1 + scores)
    if number > 1 and row.conflict:
        found += sum(packed_bytes(shape.numel(), voters.bit_length()) for shape in shapes.values())
    if number > 1 and row.carried:
        found += FLOAT * count(shapes)
    if experiment.federate.secure and Form.of(experiment.federate).elects:
        found += FLOAT * count(shapes)
    return found
