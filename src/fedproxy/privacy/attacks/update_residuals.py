"""Membership from an update: the hidden states of a row that it was made of lie near the rows of ΔA."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from fedproxy.layer_map import ADAPTER_PREFIX
from fedproxy.models.encoding import Encoded
from fedproxy.models.layouts import IGNORED, collate
from fedproxy.models.lora import AdaptedModel
from fedproxy.privacy.attacks.contract import Attack, Found, Tell, membership_figures
from fedproxy.privacy.attacks.entering import entering
from fedproxy.privacy.attacks.orders import LIMITS, counted, few_steps, nearly_linear
from fedproxy.privacy.attacks.subject import Row, Subject
from fedproxy.privacy.measures.membership import Group, estimates
from fedproxy.privacy.measures.projection import residuals, row_space
from fedproxy.registry import require_range
from fedproxy.seeds import derive_seed
from fedproxy.tensors import Tensors

_A = ".lora_A.weight"


@dataclass(frozen=True)
class Options:
    """Options of the attack.

    Attributes:
        rows: Members, and non-members, of each client at most.
    """

    rows: float = 100

    def __post_init__(self) -> None:
        require_range("update-residuals", "rows", self.rows, 1, 1e6)


def update_residuals(subject: Subject, options: Options, tell: Tell) -> Found:
    """Score each row by how little of its hidden states lies outside the row spaces of the update's A matrices.

    The gradient of A is a sum of (what came back) xᵀ over the places of the batch, with x what enters the layer. So x
    of a row that was trained on lies nearer to the rows of ΔA than x of another. A row's hidden state is taken where
    its prompt ends, or, if it has none, at each place that predicts a token. Its score is the residual's mean over
    places and layers, negated. The paper attacks gradients of whole matrices; an A of rank r shows r directions of
    them, and matrices that see the same x are stacked.
    """
    if why := subject.absent_rows:
        return Found(missing=[why])
    pairs, missing = subject.pairs(int(options.rows))
    found, fewest = Found(missing=missing), LIMITS.min_rows
    orders: dict[str, tuple[int | None, Mapping[str, Any]]] = {
        "the run's settings, whole round": (None, {}),
        "nearly linear, whole round": (None, nearly_linear()),
        f"the run's settings, {fewest} rows": (fewest, few_steps(fewest)),
        f"nearly linear, {fewest} rows": (fewest, {**nearly_linear(), **few_steps(fewest)}),
        f"nearly linear, rank {LIMITS.max_rank}, {fewest} rows": (
            fewest,
            {**nearly_linear(), **few_steps(fewest), "lora_r": LIMITS.max_rank},
        ),
    }
    for number, (where, (first, changes)) in enumerate(orders.items() if pairs else ()):
        groups, counts, steps = list[Group](), [0, 0], 0
        for place, pair in enumerate(pairs):
            tell((number + place / len(pairs)) / len(orders), f"{where} · {pair.client}")
            trained: Sequence[Row] = subject.rows[pair.client] if first is None else pair.members[:first]
            reply = subject.update(pair.client, subject.examples(trained), changes)
            model, steps = subject.before_training(), max(steps, reply.steps)
            sides = (pair.members if first is None else trained, pair.others)
            scores = [
                row_scores(model, reply.update, subject.examples(side), pad=subject.pad, batch_size=16)
                for side in sides
            ]
            groups.append((scores[0], scores[1]))
            counts = [count + len(side) for count, side in zip(counts, scores, strict=True)]
        measured = estimates(groups, seed=derive_seed(subject.seed, "audit", where))
        of = f"{len(pairs)} clients, {counts[0]} members, {counts[1]} others"
        found.figures += membership_figures(f"{where}, {counted(steps, 'step')}", measured, of)
    return found


def row_scores(
    model: AdaptedModel, update: Tensors, examples: Sequence[Encoded], *, pad: int, batch_size: int
) -> list[float]:
    """How near the hidden states of each row are to an update, from -1 (orthogonal to it) to 0 (within its span).

    Args:
        model: The proxy with the adapter that the update is added to.
        update: The update, by PEFT's names.
        examples: The rows.
        pad: Padding token id.
        batch_size: Rows in a forward pass.
    """
    base: Any = model.get_base_model()
    model.eval()
    names = [name for name in update if name.endswith(_A)]
    layers = [name.removeprefix(ADAPTER_PREFIX).removesuffix(_A) for name in names]
    bases: dict[str, torch.Tensor] = {}
    found = []
    for begin in range(0, len(examples), batch_size):
        batch = collate(examples[begin : begin + batch_size], pad)
        places = _places(batch.pop("labels"))
        with entering(base, layers) as seen:
            base(**{name: tensor.to(base.device) for name, tensor in batch.items()}, use_cache=False)
        bases = bases or {
            alike[0]: row_space(torch.cat([update[names[layers.index(layer)]] for layer in alike]))
            for alike in _alike(seen)
        }
        left = torch.stack([residuals(seen[layer].cpu()[places], basis.cpu()) for layer, basis in bases.items()]).mean(
            dim=0
        )
        rows = places.nonzero()[:, 0]
        found += [-float(left[rows == row].mean()) for row in range(len(places))]
    return found


def _places(labels: torch.Tensor) -> torch.Tensor:
    """Where a row's hidden states are taken, bool [rows, tokens]: where its prompt ends, or at all that predict."""
    predicts = F.pad(labels[:, 1:] != IGNORED, (0, 1))
    first = predicts & (predicts.cumsum(dim=1) == 1)
    return torch.where(predicts[:, :1], predicts, first)


def _alike(seen: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Layers that were entered by the same hidden states, together."""
    left = list(seen)
    while left:
        alike = [name for name in left if torch.equal(seen[name], seen[left[0]])]
        left = [name for name in left if name not in alike]
        yield alike


UPDATE_RESIDUALS = Attack(
    name="update-residuals",
    title="Was this row trained on? By the span of an update",
    paper="ProjRes, arXiv 2604.21197",
    sees="the server, which has the proxy, one client's update of the first round and the rows in question; of 'nearly "
    "linear', a server that chose the settings for it",
    options=Options,
    run=update_residuals,
)
