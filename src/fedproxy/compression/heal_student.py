"""The proxy as a student: loaded for training, run with its hidden states seen, written back."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedproxy.checkpoint_files import replace_weights
from fedproxy.config import Heal
from fedproxy.models.checkpoints import load_model, save_checkpoint
from fedproxy.models.families import blocks
from fedproxy.models.gradients import suit_attention
from fedproxy.models.lora import AdaptedModel, adapter_config, adapter_parameters, adapter_state, attach
from fedproxy.models.merging import merge_adapter
from fedproxy.models.precision import bf16_is_fast
from fedproxy.models.source import Source

_ALPHA_PER_RANK = 2
HALF_DONE = "healed"
"""Name of the directory, within the work directory, that weights are written to before they replace the proxy's."""


@contextlib.contextmanager
def leaving(blocks: nn.ModuleList, numbers: Iterable[int]) -> Iterator[list[torch.Tensor]]:
    """Collect the hidden states that leave the blocks of these numbers, in the order in which they are run."""
    found: list[torch.Tensor] = []

    def collect(_module: nn.Module, _entered: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as hooks:
        for i in numbers:
            hooks.enter_context(blocks[i].register_forward_hook(collect))
        yield found


class Student:
    """A proxy in training. Only weights of blocks are trained, unless all are: embeddings and head stay the LLM's.

    The model stays in evaluation state, so that no dropout disturbs the comparison with the teacher.

    Args:
        proxy: The proxy on disk.
        settings: The [heal] table.
        trained: The blocks that are trained.
        seed: Seed of the LoRA adapter's beginning.
        longest: Tokens of the longest text.
        everything: In mode "full", train what is outside the blocks, too, as somebody may who owes the LLM nothing.
    """

    def __init__(
        self,
        proxy: Source,
        settings: Heal,
        trained: Sequence[int],
        *,
        seed: int,
        longest: int,
        everything: bool = False,
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._proxy, self.trained = proxy, list(trained)
        base: Any = load_model(proxy.path, trust_remote_code=proxy.trust_remote_code)
        self._dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
        self._attention = base.config._attn_implementation
        suit_attention(base, self._attention, longest, self.device)
        self._blocks = blocks(base)
        if settings.mode == "full" or self.device.type == "cpu":  # where half precision is slow, but for autocast
            base.float()
        self._adapted: AdaptedModel | None = None
        if settings.mode == "lora":
            alpha = _ALPHA_PER_RANK * settings.lora_r
            self._adapted = attach(base, r=settings.lora_r, alpha=alpha, dropout=0.0, layers=trained, seed=seed)
            self.parameters: dict[str, nn.Parameter] = dict(sorted(adapter_parameters(self._adapted).items()))
        elif everything:
            self.parameters = dict(base.named_parameters())
        else:
            base.requires_grad_(False)
            self.parameters = {
                f"{number}.{name}": parameter.requires_grad_(True)  # type: ignore[misc]
                for number in trained
                for name, parameter in self._blocks[number].named_parameters()
                if parameter.is_floating_point()
            }
        self._base = base
        self._model: Any = (self._adapted or base).to(self.device).eval()

    @property
    def model(self) -> Any:
        """The proxy as it is by now, in evaluation state."""
        return self._model

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the proxy.

        Args:
            input_ids: Token numbers, [texts, tokens].
            attention_mask: 1 for a token, 0 for padding, [texts, tokens].

        Returns:
            Logits [real tokens, vocabulary], and the hidden state leaving each block, [real tokens, width]: those of
            the first text, then those of the second, and so on, without the padding.
        """
        ids, mask = input_ids.to(self.device), attention_mask.to(self.device)
        real = mask.bool()
        with (
            leaving(self._blocks, range(len(self._blocks))) as hidden,
            torch.autocast(self.device.type, torch.bfloat16, bf16_is_fast(self.device)),
        ):
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[real], [state[real] for state in hidden]

    def write(self, work: Path) -> None:
        """Replace the weights of the proxy's checkpoint by what was learned.

        Args:
            work: Directory on the same disk, for what is half done.

        Raises:
            ResourceError: the disk is full.
        """
        made = work / HALF_DONE
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        if self._adapted is not None:
            tensors, config = adapter_state(self._adapted), adapter_config(self._adapted)
            merge_adapter(self._proxy, tensors, config, made)
        else:
            self._base.set_attn_implementation(self._attention)
            for name, parameter in self._base.named_parameters():
                parameter.data = parameter.data.to("cpu", self._dtypes[name])
            save_checkpoint(made, self._base, self._proxy.path)
        replace_weights(self._proxy.path, made)
