"""Decode-time proxy tuning: what the proxy learned is added to the LLM's logits; no weight of the LLM changes.

For each token: logits = LLM + α (tuned proxy − untuned proxy), all three over the same vocabulary. The proxy is in
memory once: the untuned logits come from the same weights with the adapter switched off. It is for owners who may not
change the weights of their LLM, and costs three forwards a token: one of the LLM and two of the proxy.

Reference:
    Liu, Han, Wang, Tsvetkov, Choi, Smith: "Tuning Language Models by Proxy", COLM 2024, arXiv 2401.08565.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import LogitsProcessor, PreTrainedModel

from fedproxy.errors import ArtifactError, UsageError

NO_PAST = (None, None)


def padding_mask(prompt: torch.Tensor, pad_token_id: int | None) -> torch.Tensor:
    """Tell the padding on the left of prompts from the padding token; the last token of a prompt is never padding.

    Returns:
        Attention mask, (rows, length): 0 on the run of padding tokens that a row begins with, else 1.
    """
    mask = torch.ones_like(prompt)
    if pad_token_id is not None:
        mask[:, :-1] = (prompt[:, :-1] != pad_token_id).cumsum(1) > 0
    return mask


def pad_token(model: PreTrainedModel | PeftModel) -> int | None:
    """Return what `generate` pads with, if the model says so."""
    named = (getattr(getattr(model, part, None), "pad_token_id", None) for part in ("generation_config", "config"))
    return next((token for token in named if token is not None), None)


def call_model(model: PreTrainedModel | PeftModel, options: dict[str, Any]) -> Any:
    """Call a model with those of the options that it takes and that are not None."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    takes = inspect.signature(bare.forward).parameters
    return model(**{name: value for name, value in options.items() if value is not None and name in takes})


class Contrast:
    """Tuned minus untuned logits of one proxy."""

    def __init__(self, proxy: PeftModel, alpha: float) -> None:
        if not isinstance(proxy, PeftModel):
            raise UsageError(f"the proxy is a {type(proxy).__name__}: load it with its adapter as a PEFT model.")
        if not math.isfinite(alpha):
            raise UsageError(f"alpha must be a finite number, got {alpha}.")
        self.proxy, self.alpha = proxy, alpha
        self._layers = [
            module
            for module in proxy.modules()
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not module.disable_adapters
        ]
        if not self._layers:
            raise UsageError("the proxy's adapter is switched off: enable it.")
        self._parameters = [parameter for layer in self._layers for parameter in layer.parameters()]

    @contextlib.contextmanager
    def _untuned(self) -> Iterator[None]:
        """What `proxy.disable_adapter()` does, without its walks over the whole model and with nothing left trainable.

        Those walks take as long as a proxy's forward of one token.
        """
        trainable = [parameter.requires_grad for parameter in self._parameters]
        try:
            for layer in self._layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)
            for parameter, before in zip(self._parameters, trainable, strict=True):
                if parameter.requires_grad != before:
                    parameter.requires_grad_(before)

    def add_to(
        self, scores: torch.Tensor, past: tuple[Any, Any], inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, Any]]:
        """Add α (tuned − untuned) in float32.

        Args:
            scores: The LLM's logits, (rows, tokens, vocabulary).
            past: Caches of the tuned and of the untuned proxy.
            inputs: What both proxies read.

        Returns:
            The sum and the two caches.

        Raises:
            ArtifactError: the vocabularies differ in size.
        """
        here = {name: x.to(self.proxy.device) if torch.is_tensor(x) else x for name, x in inputs.items()}
        tuned = call_model(self.proxy, {**here, "past_key_values": past[0]})
        with self._untuned():
            untuned = call_model(self.proxy, {**here, "past_key_values": past[1]})
        if tuned.logits.shape[-1] != scores.shape[-1]:
            raise other_vocabulary(scores.shape[-1], tuned.logits.shape[-1])
        difference = tuned.logits[:, -scores.shape[1] :].float() - untuned.logits[:, -scores.shape[1] :].float()
        return scores.float() + self.alpha * difference.to(scores.device), (row_cache(tuned), row_cache(untuned))


def row_cache(output: Any) -> Any:
    """The cache of an output if its rows can be reordered, else None."""
    cache = getattr(output, "past_key_values", None)
    return cache if hasattr(cache, "batch_select_indices") else None


def other_vocabulary(llm: int, proxy: int) -> ArtifactError:
    """Return the error for models of so many tokens each."""
    return ArtifactError(
        f"the LLM has {llm} tokens, the proxy {proxy}: their logits cannot be added. Use a proxy of this LLM."
    )


class ProxyTuning(LogitsProcessor):
    """Logits processor for `generate` that turns the LLM's scores into those of the proxy-tuned LLM.

    `log softmax (LLM + α (tuned − untuned))`. It keeps the keys and values of both proxies from token to token; where
    rows changed places, as in beam search, it reorders them, and where they do not continue what was read, it reads
    anew. What it gets may be logits or, in beam search, log probabilities: they differ by a constant of each row, which
    the softmax takes out again. What it gives are log probabilities, since beams are compared by their sums. Tokens
    that an earlier processor ruled out stay out, and the others share their probability.

    Args:
        proxy: The proxy with its tuned adapter as a PEFT model, in evaluation state.
        alpha: How much of the difference to add; 1 in the paper, 0 leaves the LLM as it is.
        pad_token_id: What prompts are padded with on the left; the proxy's own padding token if none.
        attention_mask: Attention mask of the prompts, (prompts, length), as given to `generate`. It ties the object to
            these prompts. Only needed where a prompt begins with a token that is also the padding token; otherwise the
            padding is told from the token.

    Raises:
        UsageError: the proxy is not such a model, alpha is not finite, or, on use, the mask fits other prompts.
        ArtifactError: on use, if the vocabularies differ in size.

    Example:
        `llm.generate(**prompts, logits_processor=LogitsProcessorList([ProxyTuning(proxy)]))`

    Reference:
        Liu et al., "Tuning Language Models by Proxy", arXiv 2401.08565. Cost: two forwards of the proxy a token, beside
        the LLM's own.
    """

    def __init__(
        self,
        proxy: PeftModel,
        alpha: float = 1.0,
        *,
        pad_token_id: int | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        self._contrast = Contrast(proxy, alpha)
        if proxy.training:
            raise UsageError("the proxy is in training state, where its adapter drops inputs: call proxy.eval() first.")
        self._given = None if attention_mask is None else attention_mask.to(proxy.device)
        self._pad = pad_token(proxy) if pad_token_id is None else pad_token_id
        self._past: tuple[Any, Any] = NO_PAST
        self._seen = torch.empty(0, 0, dtype=torch.long, device=proxy.device)
        self._prompt = 0

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Turn scores of the LLM into log probabilities of the proxy-tuned LLM.

        Args:
            input_ids: All tokens so far, (rows, length).
            scores: Logits or log probabilities of the next token, (rows, vocabulary).

        Returns:
            Log probabilities, (rows, vocabulary), float32.
        """
        ids = input_ids.to(self._seen.device)
        mask = self._mask(ids)
        known = self._recall(ids.masked_fill(mask == 0, -1))
        if not known:
            self._prompt, self._past = ids.shape[1], NO_PAST
            mask = self._mask(ids)
        inputs = {
            "input_ids": ids[:, known:],
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, known:],
            "use_cache": True,
            "logits_to_keep": 1,
        }
        combined, self._past = self._contrast.add_to(scores[:, None], self._past, inputs)
        self._seen = ids.masked_fill(mask == 0, -1)
        return combined[:, 0].log_softmax(-1)

    def _mask(self, ids: torch.Tensor) -> torch.Tensor:
        """Attention mask of all tokens, (rows, length)."""
        if self._given is None:
            prompt = padding_mask(ids[:, : self._prompt], self._pad)
        else:
            copies, rest = divmod(len(ids), len(self._given))
            if rest or not copies or self._given.shape[1] > ids.shape[1]:
                raise UsageError(
                    f"the attention mask is of {len(self._given)} prompts of {self._given.shape[1]} tokens, "
                    f"but there are {len(ids)} rows of {ids.shape[1]}. Make a new ProxyTuning for each call."
                )
            prompt = self._given.repeat_interleave(copies, 0).to(ids.dtype)
        mask = torch.ones_like(ids)
        mask[:, : prompt.shape[1]] = prompt[:, : ids.shape[1]]
        return mask

    def _recall(self, ids: torch.Tensor) -> int:
        """How many tokens of each row the caches hold, once put into the order of the rows; 0 if they do not.

        Args:
            ids: All tokens so far, −1 where there is padding, (rows, length).
        """
        length = self._seen.shape[1]
        if None in self._past or length >= ids.shape[1]:
            return 0
        if torch.equal(ids[:, :length], self._seen):
            return length
        same = (ids[:, None, :length] == self._seen).all(-1)  # (rows, rows seen)
        if not bool(same.any(1).all()):
            return 0
        order = same.int().argmax(1).cpu()
        for cache in self._past:
            cache.batch_select_indices(order)
        return length
