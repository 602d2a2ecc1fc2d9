"""The harness's view of a model. Imports the harness: import it through `library.harness_module`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence

from fedproxy.errors import ArtifactError
from fedproxy.models.answer_likelihoods import keeps_cache, log_likelihoods
from fedproxy.models.checkpoints import padding
from fedproxy.models.tokens import answer_ids, text_ids

Request = tuple[tuple[str, str] | None, list[int], list[int]]


class Scorer(HFLM):  # type: ignore[misc]
    """HFLM that encodes as training does, reads a context once for all its options, and reports each answer.

    Whatever the tokenizer puts before a text (a beginning-of-sequence token, or nothing) is what is scored: the ids of
    context and continuation together are `tokens.text_ids(context + continuation)`, as in training. Log
    probabilities are taken in float32 whatever the model's data type, so that options do not tie by rounding.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, products: torch.dtype | None = None) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            softmax_dtype="float32",
            mixed_precision_dtype=products,
        )
        self.on_answer: Callable[[], None] = lambda: None
        self.set_cache_hook(self)
        self._encode = functools.lru_cache(maxsize=64)(
            lambda text, special: text_ids(tokenizer, [text], special=special)[0]
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode as training does, unless told to add nothing (the harness does so for an empty context)."""
        ids: list[int] = self._encode(string, add_special_tokens is not False)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode each prompt of a batch as training does; the harness lets the first one decide for all."""
        rows = [torch.tensor(ids) for ids in text_ids(self.tokenizer, strings)]
        ids, mask = (
            pad_sequence(of, batch_first=True, padding_value=pad, padding_side=padding_side)
            for of, pad in ((rows, padding(self.tokenizer)), ([torch.ones_like(row) for row in rows], 0))
        )
        last = slice(-left_truncate_len if left_truncate_len else None, None)
        return ids[:, last], mask[:, last]

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
        fits = all(len(context) + len(continuation) <= self.max_length for _, context, continuation in requests)
        shares = len({tuple(context) for _, context, _ in requests}) < len(requests)
        if not (fits and shares and keeps_cache(self.model)):
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return answers
        pairs = [(context, continuation) for _, context, continuation in requests]

        def done(index: int, answer: tuple[float, bool]) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)

        with torch.autocast(self.device.type, self.mixed_precision_dtype, self.mixed_precision_dtype is not None):
            return log_likelihoods(self.model, pairs, batch_size=self.batch_size, shared=True, on_answer=done)
