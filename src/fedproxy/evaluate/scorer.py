"""The harness's view of a model. Imports the harness: import it through `library.harness_module`."""

from collections.abc import Callable
from typing import Any

from lm_eval.models.huggingface import HFLM


class Scorer(HFLM):  # type: ignore[misc]
    """HFLM that encodes as the tokenizer itself does, and calls `on_answer` after each answer.

    Whatever the tokenizer puts before a text (a beginning-of-sequence token, or nothing) is what is scored: the ids of
    context and continuation together are `tokenizer(context + continuation)["input_ids"]`, as in training. Log
    probabilities are taken in float32 whatever the model's data type, so that options do not tie by rounding.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32"
        )
        self.on_answer: Callable[[], None] = lambda: None
        self.set_cache_hook(self)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode as `tokenizer(string)` does, unless told to add nothing (the harness does so for an empty context)."""
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Take note of one answer: what the harness calls on its cache hook, which is this object."""
        self.on_answer()
