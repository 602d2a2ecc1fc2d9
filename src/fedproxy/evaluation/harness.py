"""Scoring a model on tasks of the LM evaluation harness, offline, from local rows."""

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedproxy.errors import UsageError
from fedproxy.evaluation.library import SEED, contained, harness_module, templates_of
from fedproxy.evaluation.loading import load_for_evaluation
from fedproxy.metrics import main_metric, why_left_out
from fedproxy.models.checkpoints import load_model, load_tokenizer
from fedproxy.models.lora import load_with_adapter
from fedproxy.models.precision import scored_dtype, scored_products
from fedproxy.models.proxy_tuned_model import load_proxy_tuned


def evaluate(
    model: Any,
    *,
    tasks: Sequence[str],
    data: Path | str | None = None,
    include: Path | str | None = None,
    trust_tasks: bool = False,
    adapter: Path | str | None = None,
    proxy: Path | str | None = None,
    alpha: float | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    on_progress: Callable[[float, str], None] | None = None,
    on_documents: Callable[[str, list[float]], None] | None = None,
) -> dict[str, Any]:
    """Score a model on tasks of the LM evaluation harness.

    Args:
        model: Path or Hub id of a checkpoint, or a loaded model, wrapped by PEFT or not. A checkpoint is scored on the
            GPU in its own data type if there is one, else on the CPU in float32, its matrix products in bfloat16 if it
            is stored so and the processor multiplies it in hardware; a loaded model as it is.
        tasks: Names of stock tasks of the harness, or of tasks in `include`.
        data: Folder with DATA/TASK/SPLIT.jsonl in the Hub's schema for the stock tasks; None reads from the Hub.
        include: Folder of the user's own task YAMLs; their relative data_files count from the YAML's folder.
        trust_tasks: Let code that these bring run.
        adapter: Directory of an adapter to put on the checkpoint that `model` names; with `proxy`, on the proxy.
        proxy: The proxy made from `model`: what its adapter changes in its logits is added to those of the LLM, which
            stays as it is (decode-time proxy tuning; three forwards a token).
        alpha: How much of that difference to add; 1 if none.
        limit: Score at most this many rows of each task, the first ones; None scores all.
        batch_size: Rows in a forward pass.
        tokenizer: The tokenizer of a loaded model; a checkpoint brings its own.
        trust_remote_code: Let the checkpoint's own Python code run.
        on_progress: Called with the fraction done and the task's name.
        on_documents: Called for each task whose main metric is a mean over its documents, with the task's name and the
            metric of every document, in the order of the rows; not for tasks that are left out of the average.

    Returns:
        `{"tasks": {name: {metric: value, "n": rows scored}}, "average": x}`. The metrics are the harness's, without
        standard errors. The average is the mean over the tasks of each task's main metric: "acc" if it has that, else
        the first one it reports. Tasks of whose main metric less is better (such as a perplexity), or which is no share
        of 1, are left out of it, and `"left_out": {name: why}` names them; the average is None if no task is in it.

    Raises:
        UsageError: no task, an unknown task, one with code that is not trusted, a limit or batch size below 1, or
            arguments that do not go together.
        ArtifactError: the checkpoint, the adapter, the proxy or a data file is missing or cannot be used, or they do
            not belong together.
        MissingExtraError: the harness is not installed.

    Example:
        `evaluate("proxy/", tasks=["sst2"], data="data")["tasks"]["sst2"]` → `{"acc": 0.91, "n": 872}`
    """
    if not tasks or isinstance(tasks, str):
        raise UsageError(f"tasks is {tasks!r}: give a list of at least one task name.")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: give at least 1.")
    loaded = load_for_evaluation(tasks, data=data, include=include, trust_tasks=trust_tasks)
    model, tokenizer, products = _model(model, tokenizer, adapter, proxy, alpha, trust_remote_code)
    scores: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    training = model.training
    with contained(), contextlib.ExitStack() as stack:
        stack.callback(model.train, training)
        scorer = _scorer(model, tokenizer, batch_size, products)
        for index, (name, task) in enumerate(loaded.items()):
            if on_progress is not None:
                on_progress(index / len(loaded), name)
                scorer.on_answer = functools.partial(next, _reports(on_progress, task, name, index, len(loaded)))
            with templates_of(name):
                scores[name], samples = _score(scorer, task, limit, samples=on_documents is not None)
            main = main_metric(scores[name])
            higher = task.higher_is_better().get(main.partition(",")[0]) is not False
            if why := why_left_out(main, scores[name][main], higher):
                left_out[name] = why
            elif on_documents is not None and (documents := _by_document(samples, scores[name])):
                on_documents(name, documents)
    if on_progress is not None:
        on_progress(1.0, "scored")
    averaged = [metrics[main_metric(metrics)] for name, metrics in scores.items() if name not in left_out]
    average = sum(averaged) / len(averaged) if averaged else None
    return {"tasks": scores, "average": average} | ({"left_out": left_out} if left_out else {})


def harness_model(
    model: Any,
    *,
    adapter: Path | str | None = None,
    proxy: Path | str | None = None,
    alpha: float | None = None,
    batch_size: int = 64,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """Give the model that `evaluate` scores to the harness itself; arguments, and what is raised, are as of `evaluate`.

    Returns:
        A subclass of the harness's `HFLM`, in evaluation state.

    Example:
        `lm_eval.simple_evaluate(model=harness_model("llm/", proxy="proxy/", adapter="adapter/"), tasks=["sst2"])`
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: give at least 1.")
    model, tokenizer, products = _model(model, tokenizer, adapter, proxy, alpha, trust_remote_code)
    with contained():
        return _scorer(model, tokenizer, batch_size, products)


def _scorer(model: Any, tokenizer: Any, batch_size: int, products: torch.dtype | None) -> Any:
    return harness_module("fedproxy.evaluation.scorer").Scorer(model, copy.deepcopy(tokenizer), batch_size, products)


def _model(
    model: Any, tokenizer: Any, adapter: Path | str | None, proxy: Path | str | None, alpha: float | None, trust: bool
) -> tuple[Any, Any, torch.dtype | None]:
    """The model, its tokenizer, and what matrix products are narrowed to."""
    if proxy is None and alpha is not None:
        raise UsageError(f"alpha = {alpha} weighs what a proxy adds: give the proxy as well.")
    if proxy is not None and adapter is None:
        raise UsageError(f"the proxy {proxy} adds what its adapter changes: give the adapter that was tuned on it.")
    if not isinstance(model, (str, Path)):
        if tokenizer is None or adapter is not None or not isinstance(model, torch.nn.Module):
            name = type(model).__name__
            raise UsageError(f"a loaded model (here {name}) needs tokenizer=, and takes no adapter= or proxy=.")
        return model, tokenizer, None
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", scored_dtype()
    loaded: Any
    if adapter is None:
        loaded = load_model(model, dtype=dtype, trust_remote_code=trust)
    elif proxy is None:
        loaded = load_with_adapter(model, adapter, dtype=dtype, trust_remote_code=trust)
    else:
        loaded = load_proxy_tuned(
            model, proxy, adapter, alpha=1.0 if alpha is None else alpha, dtype=dtype, trust_remote_code=trust
        )
    if tokenizer is None:
        tokenizer = load_tokenizer(model, trust_remote_code=trust)
    return loaded.to(device), tokenizer, scored_products(model, trust_remote_code=trust)


def _reports(on_progress: Callable[[float, str], None], task: Any, name: str, index: int, count: int) -> Iterator[None]:
    """Tell of one more answer of a task, at each step."""
    total = sum(request.repeats for request in task.instances)
    for answers in itertools.count(1):
        on_progress((index + min(1.0, answers / total)) / count, name)
        yield


def _score(
    scorer: Any, task: Any, limit: int | None, *, samples: bool
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics of a task, and, if `samples`, what the harness knows of every document."""
    task.set_fewshot_seed(seed=SEED)
    results = harness_module("lm_eval.evaluator").evaluate(
        lm=scorer, task_dict={"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=0, log_samples=samples
    )
    metrics: dict[str, float] = {}
    for name, value in results["results"][task.task_name].items():
        metric, comma, filtered = name.partition(",")
        if comma and not metric.endswith("_stderr"):
            metrics[metric if filtered == "none" else name] = float(value)
    found = {**metrics, "n": results["n-samples"][task.task_name]["effective"]}
    return found, results["samples"][task.task_name] if samples else []


def _by_document(samples: Sequence[dict[str, Any]], metrics: dict[str, float]) -> list[float]:
    """The main metric of every document; none if the metric is no mean over the documents."""
    name = main_metric(metrics)
    metric, _, filtered = name.partition(",")
    values: list[Any] = [sample.get(metric) for sample in samples if sample["filter"] == (filtered or "none")]
    if not values or not all(isinstance(value, int | float) for value in values):
        return []
    mean = sum(values) / len(values)
    return [float(value) for value in values] if math.isclose(mean, metrics[name], abs_tol=1e-9) else []
