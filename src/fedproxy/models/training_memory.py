"""How much memory a client needs to train an adapter on a decoder, from the decoder's numbers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedproxy.config import Train
from fedproxy.models.checkpoints import Model
from fedproxy.models.families import blocks, linear_layers
from fedproxy.models.gradients import EAGER_ATTENTION_UP_TO
from fedproxy.models.quantization import BYTES_A_WEIGHT

_FLOAT, _HALF = 4, 2
_HEAP_UP_TO = 32 << 20
"""glibc takes smaller tensors from its heap, where gaps between them stay; larger ones go back to the system."""
_HEAP_WASTE = {False: 1.75, True: 4}
"""Measured: resident memory relative to the tensors that live in such a heap, without and with checkpointing."""
_ADAM = 4
"""Copies of the adapter: itself, its gradient, and two moments."""


@dataclass(frozen=True)
class DecoderNumbers:
    """What the memory of training depends on.

    Attributes:
        parameters: Number of parameters.
        weight_bytes: Bytes of a parameter as stored.
        blocks: Number of blocks.
        width: Entries of a token's hidden state.
        heads: Attention heads.
        vocabulary: Tokens the head tells apart.
        inner: Widest input of a linear layer: the inside of a block's MLP.
        linears: Inputs and outputs of every linear layer of all blocks.
        adapted: Which of `linears` get an adapter.
    """

    parameters: int
    weight_bytes: int
    blocks: int
    width: int
    heads: int
    vocabulary: int
    inner: int
    linears: tuple[tuple[int, int], ...]
    adapted: tuple[bool, ...]


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training takes beside the program itself.

    Attributes:
        weights: The frozen weights.
        adapter: The adapter, its gradient and Adam's moments.
        activations: What the forward pass keeps for the backward pass, and the logits.
    """

    weights: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.activations


def decoder_numbers(
    decoder: Model, keep: Sequence[int], targets: str | Sequence[str], parameters: int
) -> DecoderNumbers:
    """Look up the numbers of a decoder that keeps some of its blocks.

    Args:
        decoder: The whole decoder; it may be on the meta device.
        keep: The blocks that it keeps.
        targets: "all-linear", or names of linear layers within a block.
        parameters: Number of parameters with these blocks.
    """
    config: Any = decoder.config
    wanted = [targets] if isinstance(targets, str) else targets
    all_blocks = blocks(decoder)
    named = [(name, _shape(layer)) for i in keep for name, layer in linear_layers(all_blocks[i]).items()]
    return DecoderNumbers(
        parameters=parameters,
        weight_bytes=decoder.dtype.itemsize,
        blocks=len(keep),
        width=config.hidden_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        inner=max(inputs for _, (inputs, _) in named),
        linears=tuple(shape for _, shape in named),
        adapted=tuple(
            targets == "all-linear" or any(f".{name}".endswith(f".{want}") for want in wanted) for name, _ in named
        ),
    )


def bytes_to_train(decoder: Model, keep: Sequence[int], train: Train, parameters: int) -> dict[str, int]:
    """Bytes that training takes on a "cpu" and on a "gpu"; arguments as of `decoder_numbers`, and the [train] table."""
    numbers = decoder_numbers(decoder, keep, train.lora_targets, parameters)
    return {"cpu": training_memory(numbers, train, "cpu").total, "gpu": training_memory(numbers, train, "gpu").total}


def _shape(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, or of GPT-2's Conv1D."""
    return (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else tuple(layer.weight.shape)


def training_memory(decoder: DecoderNumbers, train: Train, device: Literal["cpu", "gpu"]) -> TrainingMemory:
    """Estimate what `models.training.train` takes at its peak, the beginning of a backward pass.

    With T tokens in a batch, every row as long as `max_length`, and all tokens counting in the loss:

        weights      parameters, in float32 on a CPU, as stored on a GPU (there in bfloat16 too, if stored in float32);
                     those of quantised linear layers in four bits, and their scales
        adapter      r (inputs + outputs) of every adapted layer, 4 times in float32
        activations  T times, over all linear layers: the output; of the adapted ones also the input after dropout, the
                     dropout's mask in a byte, and r; over all blocks: the MLP's inside once more, attention's output,
                     and on a CPU up to 256 tokens the attention weights; and the logits three times

    On a CPU everything is float32; on a GPU activations are bfloat16, inputs of norms and of the loss float32. Shorter
    rows, and prompts that do not count in the loss, take less. With gradient checkpointing every block's input is kept,
    and one block's activations or the logits. On a CPU, activations of a small model (hidden states of a batch under
    32 MiB) count 1.75 times, with checkpointing four times, for the gaps in the C library's heap. Not counted are the
    program and its libraries (some 0.5 GB), and the inside of a mixture of experts, whose experts get no adapter.

    Args:
        decoder: The proxy.
        train: The [train] table.
        device: "cpu" in float32, or "gpu" in bfloat16.
    """
    narrow = device == "gpu"
    item = _HALF if narrow else _FLOAT
    adapted = [shape for shape, chosen in zip(decoder.linears, decoder.adapted, strict=True) if chosen]
    adapter = train.lora_r * sum(inputs + outputs for inputs, outputs in adapted)
    mask = 1 if train.lora_dropout else 0
    a_token = item * sum(outputs for _, outputs in decoder.linears)
    a_token += sum(inputs * (item + mask) + train.lora_r * item for inputs, _ in adapted)
    a_token += decoder.blocks * item * (decoder.inner + decoder.width)
    if narrow:
        a_token += decoder.blocks * 2 * _FLOAT * decoder.width
    elif train.max_length <= EAGER_ATTENTION_UP_TO:
        a_token += decoder.blocks * _FLOAT * decoder.heads * train.max_length
    logits = decoder.vocabulary * (item + 2 * _FLOAT)
    if train.gradient_checkpointing:
        a_token = max(a_token // decoder.blocks, logits) + decoder.blocks * item * decoder.width
    else:
        a_token += logits
    tokens = train.batch_size * train.max_length
    small = not narrow and tokens * decoder.width * item < _HEAP_UP_TO
    waste = _HEAP_WASTE[train.gradient_checkpointing] if small else 1
    weight_bytes = _FLOAT
    if narrow:
        weight_bytes = decoder.weight_bytes + (_HALF if decoder.weight_bytes == _FLOAT else 0)
    quantised = sum(inputs * outputs for inputs, outputs in decoder.linears) if train.quantization == "4bit" else 0
    return TrainingMemory(
        weights=(decoder.parameters - quantised) * weight_bytes + int(quantised * BYTES_A_WEIGHT),
        adapter=adapter * (_ADAM * _FLOAT + (_HALF if narrow else 0)),
        activations=int(tokens * a_token * waste),
    )
