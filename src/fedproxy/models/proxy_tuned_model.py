"""An LLM, its proxy and the proxy's adapter as one model: decode-time proxy tuning for scoring and generating."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedproxy.artifacts import Manifest
from fedproxy.checkpoint_files import model_identity
from fedproxy.errors import ArtifactError
from fedproxy.models.checkpoints import load_model, resolve
from fedproxy.models.families import vocabulary
from fedproxy.models.lora import load_with_adapter
from fedproxy.models.proxy_tuning import (
    NO_PAST,
    Contrast,
    ProxyTuning,
    call_model,
    other_vocabulary,
    pad_token,
    padding_mask,
    row_cache,
)


@dataclass(frozen=True)
class _Past:
    """The keys and values of LLM, tuned and untuned proxy."""

    llm: Any
    proxy: tuple[Any, Any]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of these numbers, in this order."""
        for cache in (self.llm, *self.proxy):
            cache.batch_select_indices(indices.cpu())


class ProxyTunedModel(nn.Module):
    """LLM + α (tuned proxy − untuned proxy) as one model, for scoring and generating.

    Args:
        llm: The LLM, untouched.
        proxy: The proxy with its tuned adapter as a PEFT model.
        alpha: How much of the difference to add.

    Raises:
        ArtifactError: the vocabularies differ in size.
        UsageError: the proxy is no PEFT model, or alpha is not finite.

    Reference:
        Liu et al., "Tuning Language Models by Proxy", arXiv 2401.08565. Cost: three forwards a token.
    """

    def __init__(self, llm: PreTrainedModel, proxy: PeftModel, alpha: float = 1.0) -> None:
        super().__init__()
        self._contrast = Contrast(proxy, alpha)
        base: Any = proxy.get_base_model()
        sizes = vocabulary(llm), vocabulary(base)
        if len(set(sizes)) > 1:
            raise other_vocabulary(*sizes)
        self.llm: Any = llm
        self.proxy, self.alpha = proxy, alpha
        self.config = llm.config

    @property
    def device(self) -> torch.device:
        """Where the LLM is."""
        return torch.device(self.llm.device)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the LLM's weights; logits are float32."""
        return self.llm.dtype  # type: ignore[no-any-return]

    def tie_weights(self) -> None:
        """Do nothing: both models come with their weights tied; the harness calls this."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: _Past | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Read tokens with all three models.

        Args:
            input_ids: Token ids, (rows, tokens).
            attention_mask: 0 on padding, (rows, all tokens with the past).
            position_ids: (rows, tokens).
            past_key_values: What an earlier call gave.
            use_cache: Give a cache with `batch_select_indices`; None if one of the models keeps none.
            logits_to_keep: Logits of the last so many tokens only; 0 for all.

        Returns:
            `.logits`, (rows, tokens, vocabulary), float32, and `.past_key_values`.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        past = past_key_values or _Past(None, NO_PAST)
        output = call_model(self.llm, {**inputs, "past_key_values": past.llm})
        logits, caches = self._contrast.add_to(output.logits[:, -logits_to_keep:], past.proxy, inputs)
        joint = _Past(row_cache(output), caches)
        kept = None if None in (joint.llm, *caches) else joint
        return CausalLMOutputWithPast(logits=logits, past_key_values=kept)  # type: ignore[arg-type]

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        logits_processor: Sequence[LogitsProcessor] = (),
        **options: Any,
    ) -> Any:
        """Generate as the LLM's own `generate` does, with `ProxyTuning` before the given logits processors.

        Args:
            input_ids: Prompts, padded on the left, (rows, length).
            attention_mask: 0 on padding; told from the padding token if none.
            logits_processor: Further processors.
            options: Whatever else `generate` takes.

        Returns:
            What the LLM's `generate` returns.
        """
        if attention_mask is None:
            attention_mask = padding_mask(input_ids, options.get("pad_token_id", pad_token(self.llm)))
        tuning = ProxyTuning(self.proxy, self.alpha, attention_mask=attention_mask)
        processors = LogitsProcessorList([tuning, *logits_processor])
        return self.llm.generate(input_ids, attention_mask=attention_mask, logits_processor=processors, **options)


def load_proxy_tuned(
    llm: str | Path,
    proxy: str | Path,
    adapter: str | Path,
    *,
    alpha: float = 1.0,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> ProxyTunedModel:
    """Load an LLM, its proxy and the adapter tuned on the proxy as one model.

    Args:
        llm: The LLM: directory or Hub id.
        proxy: The proxy made from it.
        adapter: Directory of the adapter.
        alpha: How much of the difference to add.
        dtype: Data type of both models' weights; each one's own if none.
        trust_remote_code: Let the checkpoints' own Python code run.

    Returns:
        The model in evaluation state.

    Raises:
        ArtifactError: one of the three is damaged, or they do not belong together.
        UsageError: alpha is not finite.
    """
    source, small = resolve(llm), resolve(proxy)
    made = Manifest.read(small)
    if made.kind != "proxy":
        raise ArtifactError(f"{proxy} holds a {made.kind!r}, not a proxy.")
    sha256 = model_identity(source)
    if sha256 != made.llm_sha256:
        raise ArtifactError(
            f"{proxy} is the proxy of another LLM (sha256 {made.llm_sha256[:12]}…) than {llm} ({sha256[:12]}…)."
        )
    kind = Manifest.read(Path(adapter)).kind
    if kind != "proxy-adapter":
        raise ArtifactError(f"{adapter} holds a {kind!r}; give the adapter that was tuned on the proxy.")
    tuned = load_with_adapter(small, adapter, dtype=dtype, trust_remote_code=trust_remote_code)
    whole = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code)
    return ProxyTunedModel(whole, tuned, alpha).eval()
