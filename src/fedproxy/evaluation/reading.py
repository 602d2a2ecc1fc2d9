"""How much a model has to read to be scored, without a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedproxy.evaluation.library import SEED, contained, templates_of
from fedproxy.evaluation.loading import load_for_evaluation
from fedproxy.evaluation.tasks import Folder
from fedproxy.models.tokens import text_ids

_GENERATED = 256
"""Tokens that the harness lets a model generate where the task sets no limit."""


@dataclass(frozen=True)
class Reading:
    """What scoring a task reads.

    Attributes:
        documents: Rows scored.
        tokens: Each context once, and each of its options; of what is generated, the most allowed.
    """

    documents: int
    tokens: int


def reading_of(
    names: Sequence[str],
    tokenizer: Any,
    *,
    data: Folder,
    include: Folder,
    limit: int | None,
    trust_tasks: bool = False,
) -> dict[str, Reading]:
    """Count what `evaluate` lets a model read; padding is not counted. Arguments are as of `evaluate`.

    Raises:
        UsageError, ArtifactError, MissingExtraError: as of `evaluate`.
    """
    tasks = load_for_evaluation(names, data=data, include=include, trust_tasks=trust_tasks)
    return {name: _reading(task, tokenizer, limit) for name, task in tasks.items()}


def _reading(task: Any, tokenizer: Any, limit: int | None) -> Reading:
    with contained(), templates_of(task.task_name):
        task.set_fewshot_seed(seed=SEED)
        task.build_all_requests(limit=limit)
    pairs = [_texts(instance.args) for instance in task.instances]
    contexts = {context: 0 for context, _, _ in pairs}
    wholes = [context + continuation for context, continuation, _ in pairs]
    for context, ids in zip(contexts, text_ids(tokenizer, list(contexts)), strict=True):
        contexts[context] = len(ids)
    read = sum(contexts.values())
    for (context, _, most), ids in zip(pairs, text_ids(tokenizer, wholes), strict=True):
        read += most + len(ids) - contexts[context]
    return Reading(len({instance.doc_id for instance in task.instances}), read)


def _texts(arguments: Sequence[Any]) -> tuple[str, str, int]:
    """Context, continuation and tokens to generate: of a request to score one, a whole text, or to generate."""
    context, *rest = arguments
    if not rest:
        return "", context, 0
    if isinstance(rest[0], Mapping):
        return context, "", int(rest[0].get("max_gen_toks", _GENERATED))
    return context, rest[0], 0
