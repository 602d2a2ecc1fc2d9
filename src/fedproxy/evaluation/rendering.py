"""Training rows from the harness's own templates: prompt and completion are the strings that would be scored."""

from pathlib import Path
from typing import Any

import numpy as np

from fedproxy.errors import ArtifactError, UsageError
from fedproxy.evaluation.library import contained, templates_of
from fedproxy.evaluation.loading import load_for_training
from fedproxy.models.validating import OPTIONS, Options
from fedproxy.seeds import derive_seed


def training_rows(
    task: str,
    *,
    data: Path | str | None = None,
    include: Path | str | None = None,
    trust_tasks: bool = False,
    limit: int | None = None,
    seed: int = 0,
    split: str | None = None,
    options: bool = False,
) -> list[dict[str, Any]]:
    r"""Render a task's training split as prompts and completions.

    The prompt is the harness's context without few-shot examples; the completion is what the harness would score after
    it for the right answer: for a choice among options the delimiter and the right option (the first, if several are
    right), for generation the delimiter and the target. White space at the end of a context is part of the completion,
    as the harness has it. Rows without a known answer are passed over.

    Args:
        task: Name of a stock task of the harness, or of one in `include`.
        data: Folder with DATA/TASK/SPLIT.jsonl; None reads from the Hub.
        include: Folder of the user's own task YAMLs.
        trust_tasks: Let code that these bring run.
        limit: At most this many rows, chosen by `seed`; None takes all, in their order.
        seed: The same seed chooses the same rows.
        split: The split to render; None takes the task's training split.
        options: Let each row of a choice bring all that the harness would score for it, as `validating.Options`.

    Returns:
        Rows of {"prompt", "completion"}, and "options" if asked for.

    Raises:
        UsageError: an unknown task, one with code that is not trusted, or a limit below 1.
        ArtifactError: the task has no training split or no answers, or its files are missing or cannot be used.
        MissingExtraError: the harness is not installed.

    Example:
        `training_rows("sst2", data="data")` reads data/sst2/train.jsonl and gives rows such as
        `{"prompt": "a gem .\nQuestion: Is this sentence positive or negative?\nAnswer:", "completion": " positive"}`
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} rows: give at least 1.")
    loaded = load_for_training(task, split=split, data=data, include=include, trust_tasks=trust_tasks)
    documents = loaded.task_docs
    order: Any = range(len(documents))
    if limit is not None:
        order = np.random.default_rng(derive_seed(seed, "training rows", task)).permutation(len(documents)).tolist()
    rows: list[dict[str, Any]] = []
    with contained(), templates_of(task):
        for index in order:
            if (pair := answered(loaded, documents[index])) is not None:
                context, continuation = pair
                prompt = context.rstrip()
                rows.append({"prompt": prompt, "completion": context[len(prompt) :] + continuation})
                if options and loaded.OUTPUT_TYPE == "multiple_choice":
                    rows[-1][OPTIONS] = _options(loaded, documents[index])
            if len(rows) == limit:
                break
    if not rows:
        raise ArtifactError(f"none of the {len(documents)} rows of the task {task!r} has a known answer.")
    return rows


def answered(task: Any, document: dict[str, Any]) -> tuple[str, str] | None:
    """The context and the continuation that the harness would score for a document's right answer; None if not known.

    Raises:
        UsageError: the task has no answers: it scores whole texts.
    """
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise UsageError(f"the task {task.task_name!r} scores whole texts; it has no answers to train on.")
    answer = _answer(task, document)
    if answer is None:
        return None
    if task.OUTPUT_TYPE == "generate_until":
        return _context(task, document), f"{task.config.target_delimiter}{answer}"
    requests = _requests(task, document)
    request = requests[answer] if task.OUTPUT_TYPE == "multiple_choice" else requests
    context, continuation = request.arguments
    return context, continuation


def _context(task: Any, document: dict[str, Any]) -> Any:
    return task.fewshot_context(doc=document, num_fewshot=0, gen_prefix=task.doc_to_prefix(document))


def _requests(task: Any, document: dict[str, Any]) -> Any:
    context = _context(task, document)
    return task.construct_requests(doc=document, ctx=context, metadata=(task.task_name, 0, 1))


def _options(task: Any, document: dict[str, Any]) -> Options:
    """What the harness scores for a document of a choice, and the right ones."""
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    right = frozenset(gold) if isinstance(gold, list) else frozenset({_answer(task, document)})
    count = len(task.doc_to_choice(document))
    return Options([request.arguments for request in _requests(task, document)[:count]], right)


def _answer(task: Any, document: dict[str, Any]) -> Any:
    """The right option's number for a choice, else the target; None if it is not known."""
    try:
        gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    except ValueError:  # templates look the answer's key up among the options
        return None
    if isinstance(gold, list):
        gold = gold[0] if gold else None
    if task.config.doc_to_choice is None:
        return gold if gold != "" else None
    options = task.doc_to_choice(document)
    if isinstance(gold, str):
        gold = options.index(gold) if gold in options else None
    if not isinstance(gold, int) or not 0 <= gold < len(options):
        return None
    return gold if task.OUTPUT_TYPE == "multiple_choice" else options[gold]
