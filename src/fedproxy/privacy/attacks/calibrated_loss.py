"""Membership from the loss: a row that a model was tuned on has lost more of its loss than rows like it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedproxy.models.lora import AdaptedModel, without_adapter
from fedproxy.models.row_losses import row_losses
from fedproxy.privacy.attacks.contract import Attack, Found, Tell, membership_figures
from fedproxy.privacy.attacks.subject import Subject
from fedproxy.privacy.measures.membership import Group, estimates
from fedproxy.registry import require_range
from fedproxy.seeds import derive_seed

Losses = tuple[list[float], list[float]]
"""Losses a token of members and of non-members."""


@dataclass(frozen=True)
class Options:
    """Options of the attack.

    Attributes:
        rows: Members, and non-members, of each client at most.
    """

    rows: float = 400

    def __post_init__(self) -> None:
        require_range("calibrated-loss", "rows", self.rows, 1, 1e6)


def calibrated_loss(subject: Subject, options: Options, tell: Tell) -> Found:
    """Score each row by how much lower its loss is in the tuned model than in the untuned proxy.

    With l(x) the mean loss of row x over the tokens that training counts, the score is l_untuned(x) - l_tuned(x):
    what tuning made of the row, less how easy it is. The plain loss, -l_tuned(x), stands beside it. The untuned model
    is the proxy for the LLM, too: who attacks the LLM through its API has the proxy as a client, and not the LLM.
    """
    if why := subject.absent_rows:
        return Found(missing=[why])
    pairs, missing = subject.pairs(int(options.rows))
    found = Found(missing=missing)
    if not pairs:
        return found
    encoded = {one.client: (subject.examples(one.members), subject.examples(one.others)) for one in pairs}

    def losses(model: AdaptedModel, begin: float, doing: str) -> dict[str, Losses]:
        result = {}
        for number, (client, sides) in enumerate(encoded.items()):
            tell(begin + number / len(encoded) / 3, f"{doing} · {client}")
            both = [
                [total / one.counting for total, one in zip(_sums(subject, model, side), side, strict=True)]
                for side in sides
            ]
            result[client] = (both[0], both[1])
        return result

    proxy = subject.tuned_proxy()
    with without_adapter(proxy):
        untuned = losses(proxy, 0.0, "untuned proxy")
    models = {"tuned proxy": losses(proxy, 1 / 3, "tuned proxy")}
    del proxy
    if subject.is_fused:
        models["fused LLM"] = losses(subject.fused(), 2 / 3, "fused LLM")
    else:
        found.missing.append("The run keeps no fused LLM (RUN/fused): `fedproxy run --resume` writes it.")
    for model, tuned in models.items():
        _add(found, f"{model}, calibrated", {c: _gains(untuned[c], tuned[c]) for c in encoded}, subject.seed)
        _add(found, f"{model}, plain loss", {c: _falls(tuned[c]) for c in encoded}, subject.seed, each=False)
    return found


def _sums(subject: Subject, model: AdaptedModel, side: Sequence[Any]) -> list[float]:
    return row_losses(model, side, pad=subject.pad, batch_size=subject.experiment.train.batch_size)


def _gains(untuned: Losses, tuned: Losses) -> Group:
    members, others = ([a - b for a, b in zip(*sides, strict=True)] for sides in zip(untuned, tuned, strict=True))
    return members, others


def _falls(tuned: Losses) -> Group:
    members, others = ([-loss for loss in side] for side in tuned)
    return members, others


def _add(found: Found, where: str, groups: Mapping[str, Any], seed: int, *, each: bool = True) -> None:
    """Add the figures of all clients together, and of each one alone."""
    parts = {"mean over clients": list(groups.values())}
    if each and len(groups) > 1:
        parts |= {client: [group] for client, group in groups.items()}
    for part, chosen in parts.items():
        counts = [sum(len(group[side]) for group in chosen) for side in (0, 1)]
        measured = estimates(chosen, seed=derive_seed(seed, "audit", where, part))
        of = f"{counts[0]} members, {counts[1]} others"
        found.figures += membership_figures(f"{where}, {part}" if len(groups) > 1 else where, measured, of)


CALIBRATED_LOSS = Attack(
    name="calibrated-loss",
    title="Was this row trained on? By its loss",
    paper="LoRA-Leak, arXiv 2507.18302",
    sees="a client, who has the proxy and the adapter; of the fused LLM, a client who also gets log probabilities from "
    "its API",
    options=Options,
    run=calibrated_loss,
)
