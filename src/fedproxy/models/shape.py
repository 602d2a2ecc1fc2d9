"""An LLM as its configuration describes it: names and shapes of what it would hold; its weights need not be there."""

import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedproxy.models.checkpoints import Model, build_skeleton, load_config, resolve
from fedproxy.models.families import blocks, blocks_path


@dataclass(frozen=True)
class Shape:
    """A decoder without weights.

    Attributes:
        path: The directory of its configuration and tokenizer.
        decoder: The text decoder, on the meta device.
        parameters: Number of parameters of the whole model, of which the decoder may be a part.
        bytes: Size of the whole model's tensors.
    """

    path: Path
    decoder: Model
    parameters: int
    bytes: int

    @functools.cached_property
    def blocks(self) -> nn.ModuleList:
        """The decoder's blocks."""
        return blocks(self.decoder)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @functools.cached_property
    def outside(self) -> list[nn.Parameter]:
        """The decoder's parameters outside its blocks: embeddings, final norm and head."""
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        return [parameter for parameter in self.decoder.parameters() if id(parameter) not in inside]

    def of_block(self, number: int) -> list[nn.Parameter]:
        """The parameters of a block."""
        return list(self.blocks[number].parameters())

    def with_blocks(self, keep: Collection[int]) -> list[nn.Parameter]:
        """The parameters of the decoder that has some of the blocks."""
        return [*self.outside, *(parameter for number in keep for parameter in self.of_block(number))]


def entries(parameters: Iterable[nn.Parameter]) -> int:
    """Number of values."""
    return sum(parameter.numel() for parameter in parameters)


def size(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def open_shape(llm: str | Path, *, trust_remote_code: bool = False) -> Shape:
    """Look at an LLM's configuration; of a Hub id only that and the tokenizer are downloaded.

    Where the configuration names no data type, float32 is taken, as transformers takes it.

    Args:
        llm: Directory or Hub id.
        trust_remote_code: Let the checkpoint's own Python code run.

    Raises:
        ArtifactError: there is no configuration, or it is of a sort that can be neither compressed nor fused.
    """
    path = resolve(llm, weights=False)
    config = load_config(path, trust_remote_code=trust_remote_code)
    whole = build_skeleton(path, config, torch.float32, trust_remote_code=trust_remote_code)
    whole.tie_weights()
    blocks_path(whole)
    text, decoder = config.get_text_config(decoder=True), whole
    if text is not config:
        decoder = build_skeleton(path, text, whole.dtype)
        decoder.tie_weights()
    return Shape(path, decoder, entries(whole.parameters()), size(whole.parameters()))
