"""Text from an update: which tokens of the vocabulary a client's rows hold."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedproxy.errors import ArtifactError
from fedproxy.layer_map import split_name
from fedproxy.models.encoding import Encoded
from fedproxy.models.families import blocks_path, vocabulary
from fedproxy.models.lora import AdaptedModel
from fedproxy.privacy.attacks.contract import Attack, Figure, Found, Tell
from fedproxy.privacy.attacks.entering import entering
from fedproxy.privacy.attacks.orders import EPSILON, LIMITS, RATE, counted, few_steps, nearly_linear
from fedproxy.privacy.attacks.subject import Row, Subject
from fedproxy.privacy.measures.projection import residuals, row_space
from fedproxy.registry import require_range
from fedproxy.tensors import Tensors

ROWS = (1, 4, 16)
"""Rows that the update is of, beside all of a round."""
FAR = 0.5
"""A token whose residual is below this share of the vocabulary's median is said to be in the text."""
_AT_ONCE = 1024


@dataclass(frozen=True)
class Options:
    """Options of the attack.

    Attributes:
        epsilon: The adam_epsilon that a malicious server asks for; it has to be far above every gradient.
    """

    epsilon: float = EPSILON

    def __post_init__(self) -> None:
        require_range("token-spans", "epsilon", self.epsilon, 1e-8, 1e9)


@dataclass(frozen=True)
class _Case:
    """An update that is attacked: what it is called, the rows that it is of, and the settings of [train] changed."""

    name: str
    rows: Sequence[Encoded]
    changes: Mapping[str, Any]


def token_spans(subject: Subject, options: Options, tell: Tell) -> Found:
    """Check every token of the vocabulary against the row space of the update of the first block's A matrices.

    The gradient of A is a sum over places of (what came back) xᵀ, with x what enters the layer. So its rows lie in the
    span of the inputs, and where there are fewer inputs than rows of A, each input lies in the span of the rows. Before
    attention, x is a function of the token alone (and of its place, in models that add positions): all are tried.
    Matrices that see the same x, those of queries, keys and values, are stacked.

    A is not moved by the first step, since B begins at zero; so two steps are the fewest. Adam divides each entry of
    the gradient by its size, which bends the span, but not with an epsilon far above all of them.
    """
    if why := subject.absent_rows:
        return Found(missing=[why])
    client = min(subject.rows)
    found, cases = Found(), _cases(subject, subject.rows[client], options)
    for number, case in enumerate(cases):
        tell(number / len(cases), case.name)
        reply = subject.update(client, case.rows, case.changes)
        model = subject.before_training()
        layers, places = lookups(model, list(reply.update), subject.longest)
        if not layers:
            found.missing.append("No layer of the first block that sees tokens before attention is trained.")
            return found
        moved = moved_rows(reply.update, layers)
        found.figures += figures(
            f"{case.name}, {counted(reply.steps, 'step')}",
            vocabulary_residuals(model, layers[0], places, row_space(moved)),
            case.rows,
            f"{client}: {counted(len(case.rows), 'row')}",
        )
    found.notes += [
        "Tokens are counted once each, whatever their order. The last token of a row is left out: nothing of an update "
        "depends on what it enters with.",
        f"Nearly linear: adam_epsilon = {options.epsilon:g}, learning_rate = {RATE * options.epsilon:g}, no dropout, "
        "fp32. Of a client's default limits max_adam_epsilon alone declines these settings; none declines the rank "
        "and the cut rows of the last case.",
    ]
    return found


def _cases(subject: Subject, rows: Sequence[Row], options: Options) -> list[_Case]:
    linear = nearly_linear(options.epsilon)
    counts = [count for count in ROWS if count < len(rows)]
    cases = [
        _Case(f"{kind}, {counted(count, 'row')}", subject.examples(rows[:count]), {**how, **few_steps(count)})
        for kind, how in (("the run's settings", {}), ("nearly linear", linear))
        for count in counts
    ]
    cases += [
        _Case("the run's settings, whole round", subject.examples(rows), {}),
        _Case("nearly linear, whole round", subject.examples(rows), linear),
    ]
    base: Any = subject.before_training().get_base_model()
    fewest = LIMITS.min_rows
    short = min(subject.longest, max(2, base.get_input_embeddings().embedding_dim // fewest))
    least = {**few_steps(fewest), "lora_r": LIMITS.max_rank, "max_length": short}
    where = f"nearly linear, rank {LIMITS.max_rank}, {fewest} rows cut to {short} tokens"
    return [*cases, _Case(where, subject.examples(rows[:fewest], short), {**linear, **least})]


def _entering(model: AdaptedModel, layers: Sequence[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What enters layers of the first block, by name within it, each [rows, places, inputs]."""
    base: Any = model.get_base_model()
    first = f"{blocks_path(base)}.0."
    with entering(base, [first + layer for layer in layers], only=True) as seen:
        base(input_ids=ids.to(next(base.parameters()).device), use_cache=False)
    return {name.removeprefix(first): entered for name, entered in seen.items()}


def lookups(model: AdaptedModel, names: Sequence[str], longest: int) -> tuple[list[str], int]:
    """The adapted layers of the first block whose input is a function of the token, or of it and its place.

    Args:
        model: The proxy.
        names: The tensors of the update.
        longest: Tokens of a row at most.

    Returns:
        Layers that see the same, by name within the block, and how many places have to be tried: 1, or `longest`.
    """
    model.eval()
    parts = [split_name(name) for name in names]
    layers = [rest.removesuffix(".lora_A.weight") for _, block, rest in parts if not block and ".lora_A." in rest]
    if not layers:
        return [], 0
    base: Any = model.get_base_model()
    a, b, c = (vocabulary(base) // 2 + number for number in range(3))
    seen = _entering(model, layers, torch.tensor([[a, b, b], [c, b, b]]))
    alike = [name for name, entered in seen.items() if torch.allclose(entered[0, 1], entered[1, 1], atol=1e-6)]
    same = [name for name in alike if torch.equal(seen[name], seen[alike[0]])]
    if not same:
        return [], 0
    placeless = torch.allclose(seen[same[0]][0, 1], seen[same[0]][0, 2], atol=1e-6)
    return same, 1 if placeless else longest


def moved_rows(update: Tensors, layers: Sequence[str]) -> torch.Tensor:
    """The update of the A matrices of layers of the first block, one below the other, [rows, inputs].

    Raises:
        ArtifactError: the update has none of them.
    """
    wanted = {f"{layer}.lora_A.weight" for layer in layers}
    parts = [tensor for name, tensor in update.items() if split_name(name)[1] == 0 and split_name(name)[2] in wanted]
    if not parts:
        raise ArtifactError(f"The update holds no A matrix of {', '.join(layers)} in the first block.")
    return torch.cat(parts)


def vocabulary_residuals(model: AdaptedModel, layer: str, places: int, basis: torch.Tensor) -> torch.Tensor:
    """The residual of each token of the vocabulary to a subspace, the smallest of all places, float64 [vocabulary]."""

    def parts() -> Iterator[torch.Tensor]:
        base: Any = model.get_base_model()
        for tokens in torch.split(torch.arange(vocabulary(base)), max(1, _AT_ONCE // places)):
            entered = _entering(model, [layer], tokens[:, None].expand(-1, places))[layer].cpu()
            yield residuals(entered.flatten(0, 1), basis).view(len(tokens), places).amin(dim=1)

    return torch.cat(list(parts()))


def figures(where: str, left: torch.Tensor, rows: Sequence[Encoded], of: str) -> Iterator[Figure]:
    """How many of the rows' tokens are found by their residuals.

    Args:
        where: As of `Figure`.
        left: The residual of each token of the vocabulary, [vocabulary].
        rows: What the update is of.
        of: As of `Figure`.
    """
    tokens = sorted({token for row in rows for token in row.ids[:-1]})
    inside = torch.zeros(len(left), dtype=torch.bool)
    inside[tokens] = True
    named = left < FAR * left.median()
    right, share = int((named & inside).sum()), len(tokens) / len(left)
    guessed = inside[left.argsort(stable=True)[: len(tokens)]]
    of = f"{of}, {len(tokens)} tokens"
    yield Figure(where, "tokens found", right / len(tokens), chance=0.0, of=of)
    if bool(named.any()):
        yield Figure(
            where, "right of those named", right / int(named.sum()), chance=share, of=f"{int(named.sum())} named"
        )
    yield Figure(where, "right of as many guesses", float(guessed.double().mean()), chance=share, of=of)


TOKEN_SPANS = Attack(
    name="token-spans",
    title="Which words do the rows hold? By the span of an update",
    paper="DAGER, NeurIPS 2024, arXiv 2405.15586",
    sees="the server, which has the proxy and one client's update of the first round; of 'nearly linear', a "
    "server that chose the settings for it",
    options=Options,
    run=token_spans,
)
