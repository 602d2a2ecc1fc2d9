"""The harness's view of a model. Imports the harness: import it through `library.harness_module`."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from fedproxy.errors import ArtifactError
from fedproxy.models.tokens import answer_ids, text_ids

SLACK = 4
"""How many tokens the contexts of one batch may differ in length."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]


class Scorer(HFLM):  # type: ignore[misc]
    """HFLM that encodes as training does, reads a context once for all its options, and reports each answer.

    Whatever the tokenizer puts before a text (a beginning-of-sequence token, or nothing) is what is scored: the ids of
    context and continuation together are `tokens.text_ids(context + continuation)`, as in training. Log
    probabilities are taken in float32 whatever the model's data type, so that options do not tie by rounding.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32"
        )
        self.on_answer: Callable[[], None] = lambda: None
        self.set_cache_hook(self)
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        takes = inspect.signature(bare.forward).parameters
        self._no_logits = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._encode = functools.lru_cache(maxsize=64)(
            lambda text, special: text_ids(tokenizer, [text], special=special)[0]
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode as training does, unless told to add nothing (the harness does so for an empty context)."""
        ids: list[int] = self._encode(string, add_special_tokens is not False)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness does, but that an option which melts into the context's last token is encoded by itself.

        Raises:
            ArtifactError: the option has no token; the harness would find it certain.
        """
        before, after = super()._encode_pair(context, continuation)
        after = answer_ids(self.tokenizer, [*before, *after], before, continuation)
        if not after:
            raise ArtifactError(
                f"The tokenizer makes no token of the option {continuation!r:.99} after {context!r:.99}."
            )
        return before, after

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Take note of one answer: what the harness calls on its cache hook, which is this object."""
        self.on_answer()

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log probability of each continuation after its context, and whether it is the most probable one.

        The harness reads context and continuation anew for each option. Here the keys and values of a context are kept
        and shared by its options. Requests that are too long for the model, or share no context, or whose model keeps
        no such cache, go the harness's way.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if len(context) + len(continuation) > self.max_length:
                break
            groups.setdefault(tuple(context), []).append(index)
        else:
            if len(groups) < len(requests) and self._keeps_cache():
                return self._score_groups(requests, groups)
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        return answers

    @torch.inference_mode()
    def _keeps_cache(self) -> bool:
        cache = self.model(torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=True).past_key_values
        return hasattr(cache, "batch_select_indices")

    @torch.inference_mode()
    def _score_groups(
        self, requests: Sequence[Request], groups: dict[tuple[int, ...], list[int]]
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in self._batches(groups):
            shared = min(map(len, batch)) - 1
            rows: dict[tuple[int, tuple[int, ...]], int] = {}
            places = []
            for number, context in enumerate(batch):
                for index in groups[context]:
                    continuation = requests[index][2]
                    tokens = (*context[shared:], *continuation[:-1])
                    places.append((index, rows.setdefault((number, tokens), len(rows)), len(tokens)))
            logs = self._read(batch, shared, list(rows))
            for index, row, end in places:
                text, _, continuation = requests[index]
                wanted = torch.tensor(continuation, device=self.device)
                found = logs[row, end - len(continuation) : end]  # (tokens of the continuation, vocabulary)
                total = float(found.gather(1, wanted[:, None]).sum())
                answers[index] = (total, bool((found.argmax(-1) == wanted).all()))
                self.cache_hook.add_partial("loglikelihood", text, answers[index])
        return answers

    def _batches(self, groups: dict[tuple[int, ...], list[int]]) -> Iterator[list[tuple[int, ...]]]:
        batch: list[tuple[int, ...]] = []
        rows = 0
        for context in sorted(groups, key=lambda ids: (-len(ids), ids)):
            more = len(groups[context])
            if batch and (rows + more > self.batch_size or len(batch[0]) - len(context) > SLACK):
                yield batch
                batch, rows = [], 0
            batch.append(context)
            rows += more
        yield batch

    def _read(
        self, contexts: list[tuple[int, ...]], shared: int, rows: list[tuple[int, tuple[int, ...]]]
    ) -> torch.Tensor:
        """Log probabilities after each token of each row, whose context's first `shared` tokens are read only once.

        Args:
            contexts: Token ids, at least `shared` each.
            shared: Length of what is read once.
            rows: For each row the number of its context and the tokens that follow.

        Returns:
            (rows, longest row, vocabulary), float32; meaningless after a row's end.
        """
        cache = None
        if shared:
            prefix = torch.tensor([context[:shared] for context in contexts], device=self.device)
            cache = self.model(prefix, use_cache=True, **self._no_logits).past_key_values
            cache.batch_select_indices(torch.tensor([number for number, _ in rows], device=self.device))
        length = max(len(tokens) for _, tokens in rows)
        following = torch.tensor([[*tokens, *[0] * (length - len(tokens))] for _, tokens in rows], device=self.device)
        logits: torch.Tensor = self.model(following, past_key_values=cache, use_cache=cache is not None).logits
        return logits.log_softmax(-1, dtype=torch.float32)
