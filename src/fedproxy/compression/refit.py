"""Refit: before each gap one linear layer is fitted, in closed form, to what the removed blocks did to public text.

It stays in the proxy, as all healing does: fusing adds only what the clients learned on top of it.

Reference: Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
2025 (arXiv 2505.02819). Departures: the layer's whole weight is fitted, not a linear map of what leaves it; a token
counts by the length of its hidden state, so that those of the first token, a thousand times as long, are neither
everything nor left out; gaps are fitted one after the other, each on what the proxy itself makes of the text.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedproxy.checkpoint_files import replace_weights, write_shards
from fedproxy.compression.heal import check_healing, in_batches, split_documents
from fedproxy.compression.teacher import perplexity_of
from fedproxy.config import Heal
from fedproxy.errors import UsageError
from fedproxy.models.block_stream import BlockStream, Passage
from fedproxy.models.checkpoints import Tokenizer
from fedproxy.models.families import linear_layers, stored_transposed
from fedproxy.models.placement import open_stream
from fedproxy.models.source import Source, open_source

RIDGE = 0.02
"""What holds a fitted weight near the old one, relative to the mean square of the layer's inputs."""
_CROOKED = 0.05
"""By so much, relatively, a block may answer a change of a layer's output otherwise than by a multiple of it."""
_HALF_DONE = "refitted"


def gaps(keep: Sequence[int], count: int) -> dict[int, int]:
    """For each proxy block behind which LLM blocks are missing, the last of these; `keep` are the blocks of `count`."""
    ends = [*(block - 1 for block in keep[1:]), count - 1]
    return {place: end for place, (block, end) in enumerate(zip(keep, ends, strict=True)) if end > block}


class Fit:
    """A ridge regression: the change D of a weight that makes inputs · D nearest to what the outputs lack.

    D minimises Σ w² |lacking - inputs · D|² + RIDGE · s · |D|², s the mean of the diagonal of Σ w² inputsᵀ inputs.
    """

    def __init__(self) -> None:
        self._gram = self._moment = torch.zeros(())
        self.before, self.tokens = 0.0, 0

    def add(self, inputs: torch.Tensor, lacking: torch.Tensor, weights: torch.Tensor) -> None:
        """Take tokens in: what enters the layer [tokens, n], what its output lacks [tokens, m], and w [tokens]."""
        x, y = inputs.float() * weights[:, None], lacking.float() * weights[:, None]
        self._gram, self._moment = self._gram.to(x) + x.T @ x, self._moment.to(x) + x.T @ y
        self.before += float(y.square().sum(dtype=torch.float64))
        self.tokens += len(x)

    def solve(self) -> tuple[torch.Tensor, float]:
        """Return D [n, m] in float64, and the mean weighted square of what is lacking with it.

        Raises:
            UsageError: a number is not finite.
        """
        gram, moment = self._gram.double(), self._moment.double()
        held = gram.clone()
        held.diagonal().add_(RIDGE * gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(held)
        change = torch.cholesky_solve(moment, factor)
        if int(failed) or not bool(change.isfinite().all()):
            raise UsageError("[heal] refit: what the model makes of the public text is not finite. Give another text.")
        after = self.before - 2 * float((moment * change).sum()) + float((change * (gram @ change)).sum())
        return change, after / self.tokens


def added_layer(stream: BlockStream, number: int, passage: Passage, hidden: torch.Tensor) -> tuple[str, float]:
    """Find the last linear layer that a block runs, and the factor by which its output is added to the hidden state.

    Args:
        stream: The model, with the weights of block `number`, as `walk` gives it.
        number: The block.
        passage: Some text.
        hidden: The hidden state of that text that enters the block, [rows, tokens, width].

    Raises:
        UsageError: what leaves the layer is not just added, so that it cannot be fitted.
    """
    layers, order = linear_layers(stream.blocks[number]), []
    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(lambda *_, name=name: order.append(name)))
        plain = stream.run(number, passage, hidden).float()
    push = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    push *= plain.square().mean(dim=-1, keepdim=True).sqrt()
    name = order[-1] if order else ""

    def pushed(_module: Any, _entered: Any, output: torch.Tensor) -> torch.Tensor:
        if output.numel() != push.numel():
            return output
        return output + push.view_as(output).to(output)

    with layers[name].register_forward_hook(pushed) if name else contextlib.nullcontext():
        answer = (stream.run(number, passage, hidden).float() - plain)[passage.real]
    push = push[passage.real]
    factors = (answer * push).sum(dim=-1) / push.square().sum(dim=-1)
    factor = float(factors.median())
    crooked = ((answer - factor * push).norm(dim=-1) / answer.norm(dim=-1)).median()
    if not abs(factor) > 0 or not float(crooked) <= _CROOKED:
        raise UsageError(
            f"[heal] refit: a block of {type(stream.model).__name__} does more with what its last linear layer gives "
            "than to add it to the hidden state. Set refit = 0; steps heal it."
        )
    return name, factor


def check_layers(stream: BlockStream, passage: Passage) -> None:
    """Check on the first block that a model can be refitted, before its blocks are scored.

    Raises:
        UsageError: what leaves the block's last linear layer is not just added.
    """
    for number, _ in stream.walk(range(1)):
        added_layer(stream, number, passage, passage.hidden)


def refit(
    source: Source,
    keep: Sequence[int],
    proxy: Path,
    *,
    trained: Sequence[int],
    settings: Heal,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    seed: int,
    placement: str = "auto",
    progress: Callable[[float], None],
) -> dict[str, Any]:
    """Fit a pruned proxy's last linear layer before each gap to the LLM, and replace its weights.

    Args:
        source: The LLM.
        keep: The LLM blocks that the proxy has, rising.
        proxy: Directory of the pruned proxy's checkpoint; only its weight files are replaced.
        trained: Proxy blocks that may be changed.
        settings: The [heal] table; `refit` is how many documents are read.
        documents: Public text.
        tokenizer: The LLM's.
        seed: Seed of the documents drawn; those held out are the ones of `heal`.
        placement: Where the models are run; see `open_stream`.
        progress: Told the fraction done.

    Returns:
        For the record: documents and tokens read; for each gap its proxy block, the layer, and the mean square of the
        relative distance to the LLM's hidden state before and after; the perplexity of the LLM and of the proxy before
        and after on documents held out; seconds.

    Raises:
        ArtifactError: the LLM, the proxy or the text cannot be used.
        UsageError: no block may be changed, or the model's blocks do not allow it.
        ResourceError: memory or disk do not suffice.
    """
    began = time.perf_counter()
    check_healing(settings, trained)
    wanted = {place: end for place, end in gaps(keep, source.count).items() if place in trained}
    learned, held_out = split_documents(documents, settings, seed, wanted=settings.refit)
    read, unseen = (in_batches(source, part, settings, tokenizer) for part in (learned, held_out))

    def opened() -> Source:
        return open_source(proxy, trust_remote_code=source.trust_remote_code)

    llm, pruned = open_stream(source, placement), opened()
    perplexity = {"llm": perplexity_of(llm, unseen)}
    said = _targets(llm, [llm.enter(batch.input_ids, batch.attention_mask) for batch in read], [*wanted.values()])
    progress(0.5)
    stream = open_stream(pruned, placement)
    perplexity["before"] = perplexity_of(stream, unseen)
    passages = [stream.enter(batch.input_ids, batch.attention_mask) for batch in read]
    weights: dict[str, torch.Tensor] = {}
    found: list[dict[str, Any]] = []
    for place, name, weight, before, after in _fitted(stream, passages, wanted, said):
        weights[_stored_name(pruned, place, name)] = weight
        found.append({"block": place, "layer": name, "before": before, "after": after})
        progress(0.5 + 0.4 * len(found) / len(wanted))
    _write(pruned, weights)
    perplexity["after"] = perplexity_of(open_stream(opened(), placement), unseen)
    progress(1.0)
    return {
        "documents": len(learned),
        "tokens": sum(int(batch.attention_mask.sum()) for batch in read),
        "gaps": found,
        "held_out": len(held_out),
        "perplexity": perplexity,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _targets(llm: BlockStream, passages: Sequence[Passage], ends: Sequence[int]) -> dict[int, list[torch.Tensor]]:
    """What leaves the LLM blocks of these numbers, for each passage."""
    states, found = llm.carried(passage.hidden for passage in passages), {}
    for number, _ in llm.walk(range(max(ends, default=-1) + 1)):
        for passage, state in zip(passages, states, strict=True):
            state.copy_(llm.run(number, passage, state))
        if number in ends:
            found[number] = llm.carried(states)
    return found


def _fitted(
    stream: BlockStream,
    passages: Sequence[Passage],
    wanted: Mapping[int, int],
    said: Mapping[int, list[torch.Tensor]],
) -> Iterator[tuple[int, str, torch.Tensor, float, float]]:
    """Walk the proxy; yields (block, layer, new weight, mean relative square of the distance before and after)."""
    states = stream.carried(passage.hidden for passage in passages)
    for number, block in stream.walk(range(max(wanted, default=-1) + 1)):
        if number in wanted:
            name, factor = added_layer(stream, number, passages[0], states[0])
            layer, fit = linear_layers(block)[name], Fit()
            for passage, state, target in zip(passages, states, said[wanted[number]], strict=True):
                entered: list[torch.Tensor] = []
                with layer.register_forward_pre_hook(lambda _, inputs, kept=entered: kept.append(inputs[0])):
                    leaving = stream.run(number, passage, state)[passage.real].float()
                real = passage.real.flatten().to(entered[0].device)
                inputs, goal = entered[0].flatten(0, -2)[real], target[passage.real].float()
                lacking, length = (goal - leaving) / factor, goal.norm(dim=-1).clamp_min(1e-6)
                fit.add(inputs, lacking.to(inputs.device), 1 / length.to(inputs.device))
            change, after = fit.solve()
            weight = layer.weight.data
            weight += (change if stored_transposed(layer) else change.T).to(weight)
            yield number, name, weight.cpu().clone(), factor**2 * fit.before / fit.tokens, factor**2 * after
        for passage, state in zip(passages, states, strict=True):
            state.copy_(stream.run(number, passage, state))


def _stored_name(proxy: Source, place: int, layer: str) -> str:
    """The name of a layer's weight in the proxy's files."""
    [name] = [
        stored
        for stored in proxy.files.tensors
        if (name := proxy.decoder_name(stored)) and proxy.block_of(name) == place and name.endswith(f".{layer}.weight")
    ]
    return name


def _write(proxy: Source, weights: Mapping[str, torch.Tensor]) -> None:
    made = proxy.path / _HALF_DONE
    made.mkdir()
    computed = {name: lambda stored, weight=weight: weight.to(stored.torch_dtype) for name, weight in weights.items()}
    write_shards(made, [dict(shard) for shard in proxy.files.shards], computed=computed)
    replace_weights(proxy.path, made)
