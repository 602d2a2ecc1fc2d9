"""The exposure sheet: what leaves the house when a proxy is handed out, and how good a model it is by itself."""

import math
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import nn

from fedproxy.checkpoint_files import Stored
from fedproxy.compression.scores.perplexity import mean_loss
from fedproxy.models.block_stream import BlockStream, Passage
from fedproxy.models.source import Source

_LARGEST_LOSS = 700.0
"""Its exponential is still a finite number."""


def perplexities(stream: BlockStream, passages: Sequence[Passage], keep: Sequence[int]) -> dict[str, Any]:
    """Measure LLM and proxy on the same text, in one walk over the LLM's blocks; the passages stay before the first.

    Returns:
        "llm" and "proxy", each exp of the mean of -log p(token | tokens before it), and "tokens", how many were
        predicted.

    Raises:
        ArtifactError: no document has two tokens, or a loss is no finite number.
    """
    llm, proxy = (stream.carried(passage.hidden for passage in passages) for _ in range(2))
    for number, _ in stream.walk():
        for states in (llm, proxy) if number in keep else (llm,):
            for passage, state in zip(passages, states, strict=True):
                state.copy_(stream.run(number, passage, state))
    found: dict[str, Any] = {
        who: math.exp(min(mean_loss(stream, passages, states, f"the {who}"), _LARGEST_LOSS))
        for who, states in (("llm", llm), ("proxy", proxy))
    }
    return {**found, "tokens": sum(int(passage.attention_mask[:, 1:].sum()) for passage in passages)}


def exposure(
    source: Source, keep: Sequence[int], *, perplexity: dict[str, Any] | None = None, healed: bool = False
) -> dict[str, Any]:
    """List what a proxy holds of its LLM.

    Args:
        source: The LLM.
        keep: The blocks that the proxy keeps.
        perplexity: What `perplexities` measured; none if there is no public text.
        healed: Whether training on public text changes the weights before they leave.

    Returns:
        "leaves" and "stays": groups of tensors, each with "group", "tensors", "parameters" and "bytes"; "tensors",
        "parameters" and "bytes" that leave altogether; "share", their parameters relative to the LLM's; "healed";
        "perplexity".
    """
    groups: dict[tuple[bool, str], list[Stored]] = {}
    kept, outside = set(keep), _outside(source)
    for stored_name, stored in source.files.tensors.items():
        name = source.decoder_name(stored_name)
        block = None if name is None else source.block_of(name)
        if name is None:
            place = (False, "parts that are no text decoder")
        elif block is not None:
            place = (block in kept, f"block {block}")
        else:
            place = (True, outside.get(name, "other"))
        groups.setdefault(place, []).append(stored)
    rows = {place: _row(place[1], groups[place]) for place in sorted(groups, key=lambda place: _order(place[1]))}
    leaves = [row for (goes, _), row in rows.items() if goes]
    total = {key: sum(row[key] for row in leaves) for key in ("tensors", "parameters", "bytes")}
    return {
        "leaves": leaves,
        "stays": [row for (goes, _), row in rows.items() if not goes],
        **total,
        "share": total["parameters"] / sum(row["parameters"] for row in rows.values()),
        "healed": healed,
        "perplexity": perplexity,
    }


def healed_perplexity(settings: Mapping[str, Any]) -> dict[str, float] | None:
    """What healing made of a proxy, by the settings of its manifest; none if it was not healed.

    Returns:
        Perplexity on public text held out: "llm", and of the proxy "before" and "after".
    """
    records = [settings[name]["perplexity"] for name in ("refit", "heal") if settings.get(name)]
    return {**records[-1], "before": records[0]["before"]} if records else None


def _row(group: str, tensors: Sequence[Stored]) -> dict[str, Any]:
    return {
        "group": group,
        "tensors": len(tensors),
        "parameters": sum(prod(stored.shape) for stored in tensors),
        "bytes": sum(stored.end - stored.begin for stored in tensors),
    }


def _order(group: str) -> tuple[int, int]:
    """Groups in the order in which a token passes them."""
    if group.startswith("block "):
        return 1, int(group.removeprefix("block "))
    return {"embeddings": 0, "final norm": 2, "head": 3}.get(group, 4), 0


def _outside(source: Source) -> dict[str, str]:
    """The group of every tensor of the decoder outside its blocks, by its name in the files."""
    head = source.decoder.get_output_embeddings()  # type: ignore[no-untyped-call]
    prefix = "" if source.multimodal else source.blocks_path.removesuffix(source.stored_path)
    found = {}
    for path, module in source.decoder.named_modules():
        if module is head:
            group = "head"
        elif isinstance(module, nn.Embedding):
            group = "embeddings"
        elif type(module).__name__.endswith("Norm"):
            group = "final norm"
        else:
            continue
        for name, _ in module.named_parameters(path, recurse=False, remove_duplicate=False):
            found[name] = found[name.removeprefix(prefix)] = group
    for name, stored in source.outer_tensors().items():
        if name not in found and head is not None and stored.shape == tuple(head.weight.shape):
            found[name] = "head"  # GPT-NeoX's files know it by another name than transformers
    return found
