"""Decoders to score and public text for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedproxy.compression.scores import SCORES, Importance
from fedproxy.models.block_stream import BlockStream, Passage
from fedproxy.models.placement import open_stream
from fedproxy.models.source import open_source
from tests.conftest import make_model


def silent(_fraction: float) -> None:
    """Report nothing."""


def tokens(*lengths: int, width: int | None = None, padding: int = 256, seed: int = 0) -> tuple[Any, Any]:
    """Random rows of so many tokens, padded on the right: token numbers and mask, [rows, width]."""
    mask = torch.tensor([[1] * n + [0] * ((width or max(lengths)) - n) for n in lengths])
    ids = torch.randint(0, 256, (len(lengths), 32), generator=torch.Generator().manual_seed(seed))[:, : mask.shape[1]]
    return torch.where(mask.bool(), ids, padding), mask


def enter(stream: BlockStream, *batches: tuple[Any, Any]) -> list[Passage]:
    """Batches before the first block."""
    return [stream.enter(ids, mask) for ids, mask in batches]


def sharded(directory: Path, family: str, **changes: Any) -> Path:
    """A checkpoint of a tiny random model in many shards."""
    make_model(family, **changes).save_pretrained(directory, max_shard_size="20kB")
    assert (directory / "model.safetensors.index.json").is_file()
    return directory


def placed(llm: Path, placement: str) -> BlockStream:
    """A checkpoint, to be run from its files or in memory."""
    return open_stream(open_source(llm), placement)


def score(
    name: str,
    stream: BlockStream,
    passages: Sequence[Passage],
    most: int = 3,
    seed: int = 0,
    among: range | None = None,
) -> Importance:
    """Score with a registered score."""
    among = range(len(stream)) if among is None else among
    return SCORES[name].score(stream, passages, most=most, among=among, seed=seed, progress=silent)
