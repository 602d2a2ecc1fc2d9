"""Log-likelihoods of answers after their contexts; a context is read once for all its answers."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

SLACK = 4
"""How many tokens the contexts of one batch may differ in length."""

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of an answer, at least one each."""


@torch.no_grad()
def keeps_cache(model: Any) -> bool:
    """Whether a model keeps the keys and values of what it read, so that several answers can follow one context."""
    token = torch.zeros(1, 1, dtype=torch.long, device=_device(model))
    return hasattr(model(token, use_cache=True).past_key_values, "batch_select_indices")


@torch.no_grad()
def log_likelihoods(
    model: Any,
    requests: Sequence[Request],
    *,
    batch_size: int,
    shared: bool,
    on_answer: Callable[[int, tuple[float, bool]], None] = lambda index, answer: None,
) -> list[tuple[float, bool]]:
    """Summed log probability of each answer after its context, and whether it is the most probable one.

    Log probabilities are taken in float32 whatever the model's data type, so that answers do not tie by rounding.

    Args:
        model: In evaluation state.
        requests: None longer than the model reads.
        batch_size: Rows in a forward pass, unless one context has more answers.
        shared: Read a context once for all its answers; the model must keep a cache (`keeps_cache`).
        on_answer: Told the number of a request and its result, as they come.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(requests):
        groups.setdefault(tuple(context), []).append(index)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    for batch in _batches(groups, batch_size):
        begin = min(map(len, batch)) - 1 if shared else 0
        rows: dict[tuple[int, tuple[int, ...]], int] = {}
        places = []
        for number, context in enumerate(batch):
            for index in groups[context]:
                tokens = (*context[begin:], *requests[index][1][:-1])
                places.append((index, rows.setdefault((number, tokens), len(rows)), len(tokens)))
        logs = _read(model, batch, begin, list(rows))
        for index, row, end in places:
            wanted = torch.tensor(list(requests[index][1]), device=logs.device)
            of_answer = logs[row, end - len(wanted) : end]  # (tokens of the answer, vocabulary)
            total = float(of_answer.gather(1, wanted[:, None]).sum())
            found[index] = (total, bool((of_answer.argmax(-1) == wanted).all()))
            on_answer(index, found[index])
    return found


def _batches(groups: Mapping[tuple[int, ...], Sequence[int]], size: int) -> Iterator[list[tuple[int, ...]]]:
    batch: list[tuple[int, ...]] = []
    rows = 0
    for context in sorted(groups, key=lambda ids: (-len(ids), ids)):
        more = len(groups[context])
        if batch and (rows + more > size or len(batch[0]) - len(context) > SLACK):
            yield batch
            batch, rows = [], 0
        batch.append(context)
        rows += more
    yield batch


def _read(
    model: Any, contexts: Sequence[tuple[int, ...]], begin: int, rows: Sequence[tuple[int, tuple[int, ...]]]
) -> torch.Tensor:
    """Log probabilities after each token of each row, whose context's first `begin` tokens are read only once.

    Args:
        model: The model.
        contexts: Token ids, at least `begin` each.
        begin: Length of what is read once.
        rows: For each row the number of its context and the tokens that follow.

    Returns:
        (rows, longest row, vocabulary), float32; meaningless after a row's end.
    """
    device, cache = _device(model), None
    if begin:
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(bare.forward).parameters else {}
        prefix = torch.tensor([context[:begin] for context in contexts], device=device)
        cache = model(prefix, use_cache=True, **few).past_key_values
        cache.batch_select_indices(torch.tensor([number for number, _ in rows], device=device))
    length = max(len(tokens) for _, tokens in rows)
    following = torch.tensor([[*tokens, *[0] * (length - len(tokens))] for _, tokens in rows], device=device)
    logits: torch.Tensor = model(following, past_key_values=cache, use_cache=cache is not None).logits
    return logits.log_softmax(-1, dtype=torch.float32)


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
