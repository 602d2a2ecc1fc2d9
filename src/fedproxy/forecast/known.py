"""What the LLM's configuration tells of its proxies: sizes, memory, and the operations of making one.

Which blocks go is decided by scores, which need the weights. Here the first ones that may go do: the blocks of a
decoder are alike, as far as sizes go.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from fedproxy.compression.compress import MEASURED, read_text
from fedproxy.compression.heal import check_healing, split_documents
from fedproxy.compression.realign import drawn_batches, emulator_blocks
from fedproxy.compression.scores import SCORES
from fedproxy.compression.select import between, removed_count
from fedproxy.config import Compress, Experiment, Train
from fedproxy.layer_map import trained_blocks
from fedproxy.models.checkpoints import Tokenizer, load_tokenizer
from fedproxy.models.costs import Matrices, matrices_of, reading, training
from fedproxy.models.families import readable
from fedproxy.models.lora import adapter_shapes
from fedproxy.models.placement import ROOM, computed_in
from fedproxy.models.shape import Shape, entries, open_shape, size
from fedproxy.models.text_batches import Batch, batches
from fedproxy.models.training_memory import bytes_to_train
from fedproxy.public_text import read_documents

FLOAT = 4
"""Bytes of a number in float32."""
Shapes = dict[str, Any]
"""Name of a tensor → its shape."""


@dataclass(frozen=True)
class ProxySize:
    """A proxy that would be made.

    Attributes:
        keep: As many LLM blocks as it keeps.
        free: Which of its blocks come from between the ends that are kept in any case.
        parameters: Number of parameters.
        bytes: Size of its tensors.
        share: Its parameters relative to the LLM's.
        matrices: Entries of its matrices.
    """

    keep: list[int]
    free: list[int]
    parameters: int
    bytes: int
    share: float
    matrices: Matrices

    def as_dict(self) -> dict[str, Any]:
        """Its size as plain values."""
        return {"blocks": len(self.keep), "parameters": self.parameters, "bytes": self.bytes, "exposed": self.share}

    def trained(self, train: Train) -> list[int]:
        """The blocks that clients train."""
        return trained_blocks(train.blocks, len(self.keep))


class Known:
    """An LLM of which the configuration and the tokenizer are known.

    Args:
        experiment: The experiment, for its [llm] table.

    Raises:
        ArtifactError: there is no such LLM, or it cannot be used.
    """

    def __init__(self, experiment: Experiment) -> None:
        llm = experiment.llm
        self._path = llm.path
        self.shape: Shape = open_shape(llm.path, trust_remote_code=llm.trust_remote_code)
        self.tokenizer: Tokenizer = load_tokenizer(self.shape.path, trust_remote_code=llm.trust_remote_code)
        self.matrices = matrices_of(self.shape.decoder)
        self._adapters: dict[str, Shapes] = {}

    def as_dict(self) -> dict[str, Any]:
        """Its size as plain values."""
        return {
            "path": self._path,
            "blocks": self.shape.count,
            "parameters": self.shape.parameters,
            "bytes": self.shape.bytes,
        }

    def proxy(self, compress: Compress) -> ProxySize:
        """The proxy of [compress].

        Raises:
            UsageError: the blocks kept in any case leave too few to remove.
        """
        blocks = self.shape.count
        removed = removed_count(blocks, compress.remove)
        among = between(blocks, compress.keep_first, compress.keep_last, removed)
        keep = sorted(set(range(blocks)).difference(among[:removed]))
        weights = self.shape.with_blocks(keep)
        return ProxySize(
            keep=keep,
            free=[place for place, block in enumerate(keep) if block in among],
            parameters=entries(weights),
            bytes=size(weights),
            share=entries(weights) / self.shape.parameters,
            matrices=Matrices([self.matrices.blocks[block] for block in keep], self.matrices.head),
        )

    def adapter(self, proxy: ProxySize, train: Train, places: Sequence[int] | None = None) -> Shapes:
        """The shapes of an adapter on blocks of a proxy, those that clients train if no others are given.

        Raises:
            UsageError: [train] does not fit the proxy.
        """
        chosen = [proxy.keep[place] for place in (proxy.trained(train) if places is None else places)]
        key = repr((chosen, train.lora_r, train.lora_targets))
        if key not in self._adapters:
            self._adapters[key] = adapter_shapes(
                self.shape.decoder, r=train.lora_r, targets=train.lora_targets, layers=chosen
            )
        return self._adapters[key]

    def passed(self, model: str, proxy: ProxySize, train: Train) -> int:
        """Entries of the matrices that a token passes which a model reads, unmerged adapters among them.

        Args:
            model: A name in [evaluate] models, or "centralized".
            proxy: The proxy.
            train: The [train] table.
        """
        llm, small, tuned = self.matrices.total, proxy.matrices.total, count(self.adapter(proxy, train))
        match model:
            case "proxy":
                return small
            case "proxy_tuned":
                return small + tuned
            case "fused":
                return llm + tuned
            case "proxy_tuning":  # the LLM, the proxy without its adapter, and with it
                return llm + 2 * small + tuned
            case "centralized":
                whole = self.proxy(Compress(remove=0.0))
                return llm + count(self.adapter(whole, replace(train, blocks="all")))
        return llm

    def training_memory(self, proxy: ProxySize, train: Train, longest: int) -> dict[str, int]:
        """Bytes that training takes on a CPU and on a GPU, with no row longer than `longest`."""
        return bytes_to_train(self.shape.decoder, proxy.keep, replace(train, max_length=longest), proxy.parameters)

    def calibration(self, experiment: Experiment) -> list[Batch]:
        """The calibration text in batches; none without a text.

        Raises:
            ArtifactError, UsageError: the text cannot be used.
        """
        settings = experiment.compress
        text = read_text(settings.calibration or None, settings.score, settings.samples, experiment.seed)
        if text is None:
            return []
        longest = self.readable(settings.max_length)
        return batches(self.tokenizer, text.documents, max_length=longest, batch_size=settings.batch_size)

    def scoring(self, experiment: Experiment, proxy: ProxySize, text: Sequence[Batch]) -> float:
        """Operations of scoring the blocks, and of the perplexities on the exposure sheet."""
        blocks, head, flops = sum(self.matrices.blocks), self.matrices.head, 0.0
        score = SCORES[experiment.compress.score]
        if score.reads_text:
            of_blocks, heads = score.passed(self.shape.count, len(proxy.keep))
            flops = 2.0 * _tokens(text) * (blocks / self.shape.count * of_blocks + head * heads)
        some = text[:: max(1, len(text) * experiment.compress.batch_size // MEASURED)]
        return flops + 2.0 * _tokens(some) * (self.matrices.total + proxy.matrices.total)

    def compressing_memory(self, text: Sequence[Batch], device: torch.device) -> dict[str, int]:
        """Bytes that compressing takes in memory, and block by block: a block, the next one, and the hidden states.

        The next block waits as it is stored; all else is in the data type that the device computes in.
        """
        stored = self.shape.decoder.dtype
        wider = (computed_in(device, stored) or stored).itemsize // stored.itemsize
        block = max(size(self.shape.of_block(number)) for number in range(self.shape.count))
        width = self.shape.decoder.config.hidden_size * stored.itemsize
        hidden = 2 * width * sum(batch.input_ids.numel() for batch in text)
        return {
            "memory": wider * (int(ROOM * self.shape.bytes) + hidden),
            "stream": wider * (size(self.shape.outside) + block + hidden) + block,
        }

    def healing(self, experiment: Experiment, proxy: ProxySize) -> float:
        """Operations of [heal]: the LLM reads all documents; the proxy reads them twice if refitted, and learns.

        Raises:
            ArtifactError: the text cannot be used.
            UsageError: a setting is impossible.
        """
        heal, spent = experiment.heal, 0.0
        if heal.refit and len(proxy.keep) < self.shape.count:
            _, tokens = self._lesson(experiment, heal.refit)
            spent += reading(tokens, self.matrices) + 2 * reading(tokens, proxy.matrices)
        if not heal.steps:
            return spent
        places = proxy.free if heal.spare_ends else list(range(len(proxy.keep)))
        check_healing(heal, places)
        documents, tokens = self._lesson(experiment, heal.steps * heal.batch_size)
        if heal.mode == "lora":
            parameters = count(self.adapter(proxy, Train(lora_r=heal.lora_r), places))
        else:
            parameters = sum(entries(self.shape.of_block(proxy.keep[place])) for place in places)
        passes = heal.steps / ceil(documents / heal.batch_size)
        learned = training(passes * tokens, proxy.matrices, trained=places, parameters=parameters)
        return spent + reading(tokens, self.matrices) + learned

    def _lesson(self, experiment: Experiment, wanted: int) -> tuple[int, int]:
        """How many documents healing draws where so many are wanted, and their tokens."""
        heal = experiment.heal
        documents, _ = split_documents(self._public(experiment), heal, experiment.seed, wanted=wanted)
        longest = self.readable(heal.max_length)
        return len(documents), _tokens(
            batches(self.tokenizer, documents, max_length=longest, batch_size=heal.batch_size)
        )

    def aligning(self, experiment: Experiment, proxy: ProxySize) -> tuple[float, int]:
        """Operations of [heal] realign_steps in all rounds, and the bytes that each round but the first sends for it.

        Raises:
            ArtifactError: the text cannot be used.
            UsageError: clients train all blocks.
        """
        if not experiment.heal.realign_steps:
            return 0.0, 0
        others = emulator_blocks(len(proxy.keep), proxy.trained(experiment.train))
        learning = count(self.adapter(proxy, experiment.train, others))
        documents, tokens = self._public(experiment), 0
        longest = self.readable(experiment.heal.max_length)
        for number in range(2, experiment.federate.rounds + 1):
            drawn = drawn_batches(documents, self.tokenizer, experiment.heal, longest, experiment.seed, number)
            tokens += sum(int(mask.sum()) for _, mask in drawn)
        learned = training(tokens, proxy.matrices, trained=others, parameters=learning)
        return reading(tokens, self.matrices) + learned, FLOAT * learning

    def readable(self, length: int) -> int:
        """So many tokens, or as many as the LLM has positions for."""
        return readable(self.shape.decoder.config, length)

    def _public(self, experiment: Experiment) -> list[str]:
        return _read(experiment.heal.text or experiment.compress.calibration)


@functools.cache
def _read(path: str) -> list[str]:
    return read_documents(Path(path))[0]


def _tokens(text: Sequence[Batch]) -> int:
    return sum(int(batch.attention_mask.sum()) for batch in text)


def count(shapes: Shapes) -> int:
    """Number of values of all tensors."""
    return sum(shape.numel() for shape in shapes.values())
