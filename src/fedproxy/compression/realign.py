"""Realign: between rounds the LLM, as tuned so far, teaches the proxy blocks that the clients do not train.

What it changes are LoRA tensors of those blocks. They go to the clients with the next round, and never to the LLM.

Reference: Wu et al., "FedBiOT: LLM Local Fine-tuning in Federated Learning without Full Model", 2024
(arXiv 2406.17706), Alg. 1, the emulator's alignment. Departures: hidden states are compared behind every block that is
aligned, relative to their length (`heal_loss.hidden_distance`), and predictions over the LLM's likeliest tokens.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedproxy.compression.heal_loss import divergence, hidden_distance, top_tokens
from fedproxy.compression.heal_student import leaving
from fedproxy.config import Heal
from fedproxy.errors import UsageError
from fedproxy.layer_map import rekey, split_name
from fedproxy.models.checkpoints import Tokenizer
from fedproxy.models.families import blocks, blocks_path, readable
from fedproxy.models.lora import AdaptedModel, adapter_parameters, adapter_state, set_adapter_state, train_only
from fedproxy.models.precision import bf16_is_fast
from fedproxy.models.text_batches import batches
from fedproxy.seeds import derive_seed
from fedproxy.tensor_files import load_tensors, read_header, save_tensors
from fedproxy.tensors import Tensors

_TOKENS = "fedproxy.tokens"


def emulator_blocks(count: int, owned: Sequence[int]) -> list[int]:
    """The proxy blocks, of `count`, that the clients do not train.

    Raises:
        UsageError: there is none.
    """
    left = sorted(set(range(count)).difference(owned))
    if not left:
        raise UsageError(
            "[heal] realign_steps aligns the blocks that clients do not train, and they train all. Choose them with "
            "[train] blocks."
        )
    return left


class Realigner:
    """Aligns the proxy in memory before each round from the second on, and keeps what it did on disk.

    Args:
        llm: The LLM with a LoRA adapter on the blocks that the clients train, as the LLM counts them.
        proxy: The proxy with a LoRA adapter on all its blocks, which the clients train on, too.
        layer_map: LLM block of each proxy block.
        owned: Proxy blocks that the clients train.
        settings: The [heal] table.
        documents: Public text.
        tokenizer: The LLM's.
        seed: The experiment's seed; what a round draws depends on it and the round alone.
        folder: Where the tensors of the last two rounds are kept.
    """

    def __init__(
        self,
        llm: AdaptedModel,
        proxy: AdaptedModel,
        *,
        layer_map: Sequence[int],
        owned: Sequence[int],
        settings: Heal,
        documents: Sequence[str],
        tokenizer: Tokenizer,
        seed: int,
        folder: Path,
    ) -> None:
        self._llm, self._proxy, self._layer_map, self._settings = llm, proxy, list(layer_map), settings
        self._emulator = emulator_blocks(len(layer_map), owned)
        self._documents, self._tokenizer, self._seed, self._folder = list(documents), tokenizer, seed, folder
        self._done = 1

    def before(self, number: int, adapter: Tensors) -> None:
        """Align the proxy for round `number`, unless that was done.

        Args:
            number: The round, from 1 on; before the first nothing is done.
            adapter: The federated adapter that the round begins with, all its tensors.

        Raises:
            UsageError: the training diverged.
        """
        if number <= self._done:
            return
        for known in (number, number - 1):
            if aligned(self._folder, known).is_file():
                self._put({**adapter, **load_tensors(aligned(self._folder, known))})
                break
        if not aligned(self._folder, number).is_file():
            tokens = aligned_tokens(self._folder) + self._align(number, adapter)
            state = {name: t for name, t in adapter_state(self._proxy).items() if self._is_emulators(name)}
            save_tensors(aligned(self._folder, number), state, metadata={_TOKENS: str(tokens)})
        aligned(self._folder, number - 2).unlink(missing_ok=True)
        self._done = number

    def _is_emulators(self, name: str) -> bool:
        return split_name(name)[1] in self._emulator

    def _put(self, tensors: Tensors) -> None:
        set_adapter_state(self._proxy, {**adapter_parameters(self._proxy), **tensors})

    def _align(self, number: int, adapter: Tensors) -> int:
        """Align, and return the number of tokens that were read."""
        settings, device = self._settings, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        llm, proxy = (model.to(device).eval() for model in (self._llm, self._proxy))
        path = blocks_path(_base(llm))
        set_adapter_state(llm, {rekey(name, self._layer_map, path): tensor for name, tensor in adapter.items()})
        self._put(adapter)
        parameters = adapter_parameters(proxy)
        before = {name: parameter.requires_grad for name, parameter in parameters.items()}
        train_only(proxy, self._is_emulators)
        trained = [parameter for name, parameter in sorted(parameters.items()) if self._is_emulators(name)]
        optimizer = torch.optim.AdamW(trained, lr=settings.highest_rate, weight_decay=0.0, fused=True)
        ends = [*(block - 1 for block in self._layer_map[1:]), len(blocks(_base(llm))) - 1]
        tokens = 0
        longest = readable(_base(self._llm).config, settings.max_length)
        drawn = drawn_batches(self._documents, self._tokenizer, settings, longest, self._seed, number)
        for ids, mask in drawn:
            tokens += int(mask.sum())
            loss = self._loss(llm, proxy, ends, ids.to(device), mask.to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            if not bool(torch.isfinite(loss)):
                raise UsageError(
                    f"aligning the proxy before round {number}: the loss became {loss.item()}. Lower [heal] "
                    "learning_rate."
                )
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        train_only(proxy, before.__getitem__)
        return tokens

    def _loss(
        self, llm: AdaptedModel, proxy: AdaptedModel, ends: Sequence[int], ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """T² KL(LLM ‖ proxy) + hidden_weight · mean over the aligned blocks of the hidden states' distance."""
        settings, real = self._settings, mask.bool()
        with torch.autocast(ids.device.type, torch.bfloat16, bf16_is_fast(ids.device)):
            with torch.no_grad(), leaving(blocks(_base(llm)), [ends[i] for i in self._emulator]) as said:
                wanted = _logits(llm, ids, mask)[real]
            with leaving(blocks(_base(proxy)), self._emulator) as own:
                logits = _logits(proxy, ids, mask)[real]
        spoken = divergence(top_tokens(wanted, settings.top_k, settings.temperature), logits, settings.temperature)
        apart = [hidden_distance(one[real], other[real]) for one, other in zip(said, own, strict=True)]
        return settings.temperature**2 * spoken + settings.hidden_weight * torch.stack(apart).mean()


def drawn_batches(
    documents: Sequence[str], tokenizer: Tokenizer, settings: Heal, longest: int, seed: int, number: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token numbers and mask, each [documents, tokens], of every step of the alignment before the round of this number.

    Of a document `longest` tokens are taken at most; the other arguments are as of `Realigner`.
    """
    generator = random.Random(derive_seed(seed, "realign", number))
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    while len(found) < settings.realign_steps:
        wanted = min(len(documents), (settings.realign_steps - len(found)) * settings.batch_size)
        drawn = batches(
            tokenizer, generator.sample(documents, wanted), max_length=longest, batch_size=settings.batch_size
        )
        generator.shuffle(drawn)
        found += [(batch.input_ids, batch.attention_mask) for batch in drawn]
    return found[: settings.realign_steps]


def _base(model: AdaptedModel) -> Any:
    return model.get_base_model()


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


def aligned(folder: Path, number: int) -> Path:
    """The file with what aligned the proxy for round `number`: LoRA tensors by name, counting proxy blocks."""
    return folder / f"{number:04d}.safetensors"


def last_aligned(folder: Path) -> Mapping[str, torch.Tensor]:
    """What aligned the proxy for the last round; empty if nothing did."""
    files = _files(folder)
    return load_tensors(files[-1]) if files else {}


def aligned_tokens(folder: Path) -> int:
    """Tokens of public text that the alignments of all rounds read."""
    files = _files(folder)
    return int(read_header(files[-1]).metadata[_TOKENS]) if files else 0


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.safetensors"))
