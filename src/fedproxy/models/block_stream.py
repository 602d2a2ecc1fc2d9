"""A decoder run block by block over many batches, with its blocks in memory or read from disk one after the other.

What the model itself hands to each block (masks, positions, rotary tables, sliding windows) is recorded from a
forward pass in which the blocks do nothing; then each block is called with it. So a model of any size is run in the
memory of one block, and gives the bits that an ordinary forward pass gives.
"""

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn import functional as F

from fedproxy.artifacts import os_error
from fedproxy.checkpoint_files import Stored
from fedproxy.errors import ArtifactError
from fedproxy.memory import available_memory
from fedproxy.models.checkpoints import Model
from fedproxy.models.families import blocks
from fedproxy.models.loading import Loader
from fedproxy.models.source import Source


@dataclass
class Passage:
    """A batch of texts on its way through the blocks.

    Attributes:
        input_ids: Token numbers, [rows, tokens].
        attention_mask: 1 for a token, 0 for padding, [rows, tokens].
        hidden: The hidden state that enters the next block, [rows, tokens, width], on the CPU.
        calls: For each block, the arguments beside the hidden state that the model calls it with.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    hidden: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(repr=False)

    @property
    def real(self) -> torch.Tensor:
        """Which tokens are no padding, boolean [rows, tokens]."""
        return self.attention_mask.bool()


class _EndError(Exception):
    """Raised by the last block of a recording, behind which nothing is wanted."""


class BlockStream:
    """A decoder whose blocks are run one after the other.

    Args:
        model: The decoder: loaded, or on the meta device if `source` is given.
        source: Where the weights of `model` lie; they are read as they are needed.
        device: Where to compute with weights that are read; a loaded model computes where it is.
        resident: Keep weights that were read once.
        dtype: Data type to compute in with weights that are read; their own if none.
    """

    def __init__(
        self,
        model: Model,
        source: Source | None = None,
        device: torch.device | None = None,
        *,
        resident: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.blocks = blocks(model)
        self._source = source
        self._device = device or torch.device("cpu")
        self._resident = resident
        self._in_tuple: bool | None = None
        if source is not None:
            self._loader = Loader(model, self._device, dtype)
            self._loader.load({name: _mapped(stored) for name, stored in source.outer_tensors().items()})
            self._loader.load_buffers()

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where token numbers go in."""
        return self._device if self._source is not None else self.model.device

    def carried(self, hidden: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Copy hidden states that are carried through the blocks, to memory, or to a file where memory is short."""
        states = list(hidden)
        needed = sum(state.nbytes for state in states)
        return carry(states, Path(tempfile.gettempdir()) if needed > available_memory() // 4 else None)

    def enter(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Passage:
        """Run what comes before the first block, and record what the model hands to each block.

        Raises:
            ArtifactError: the model does more between its blocks than to hand the hidden state on.
        """
        passage, complete = self._recorded(input_ids, attention_mask)
        if not complete and self._in_tuple is None:
            for number, _ in self.walk([0]):
                self.run(number, passage)
            passage, complete = self._recorded(input_ids, attention_mask)
        if not complete:
            raise ArtifactError(
                f"{type(self.model).__name__} works on the hidden state between its blocks, so that they cannot be "
                "run one by one. Use a model of another family."
            )
        return passage

    def _recorded(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[Passage, bool]:
        """Record what the model hands to each block, up to one that another hidden state enters: then not complete."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        entered: list[torch.Tensor] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if entered and hidden is not entered[0]:
                raise _EndError
            entered[:] = [hidden]
            calls.append((args[1:], kwargs))
            if len(calls) == len(self.blocks):
                raise _EndError
            return self._left(hidden)

        with self._standing_in(record), contextlib.suppress(_EndError):
            self._forward(input_ids, attention_mask)
        return Passage(input_ids, attention_mask, entered[0].cpu(), calls), len(calls) == len(self.blocks)

    def _left(self, hidden: torch.Tensor) -> Any:
        """What a block returns that a hidden state leaves: that alone, or at the head of a tuple."""
        return (hidden, None) if self._in_tuple else hidden

    def walk(self, numbers: Iterable[int] | None = None, *, read_ahead: bool = True) -> Iterator[tuple[int, nn.Module]]:
        """Give the blocks one by one, each with its weights; they are gone when the next one comes.

        Args:
            numbers: Which blocks, in order; all if none.
            read_ahead: Read the next block's weights while the caller works with this one.
        """
        order = list(range(len(self.blocks)) if numbers is None else numbers)
        if not any(weight.is_meta for number in order for weight in self.blocks[number].parameters()):
            yield from ((number, self.blocks[number]) for number in order)
            return
        with ThreadPoolExecutor(1) as reader:
            ahead: Future[dict[str, torch.Tensor]] | None = None
            for place, number in enumerate(order):
                tensors = ahead.result() if ahead is not None else self._read(number)
                ahead = None
                if read_ahead and place + 1 < len(order):
                    ahead = reader.submit(self._read, order[place + 1])
                with self._loader.holding(self.blocks[number], tensors, keep=self._resident):
                    del tensors
                    yield number, self.blocks[number]

    def _read(self, number: int) -> dict[str, torch.Tensor]:
        assert self._source is not None
        return {name: stored.read() for name, stored in self._source.block_tensors(number).items()}

    def run(self, number: int, passage: Passage, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Run the block of this number, which `walk` gave.

        What enters it, `hidden` or else `passage.hidden`, is [rows, tokens, width]; so is what leaves it, on the CPU.
        """
        entering = passage.hidden if hidden is None else hidden
        block = self.blocks[number]
        device = next((parameter.device for parameter in block.parameters()), self.device)
        args, kwargs = send_to_device(passage.calls[number], device)
        with torch.no_grad():
            leaving = block(entering.to(device), *args, **kwargs)
        self._in_tuple = isinstance(leaving, tuple)
        return (leaving[0] if self._in_tuple else leaving).cpu()  # type: ignore[no-any-return]

    def logits(self, passage: Passage, hidden: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """Run what comes behind the last block, row by row, on what left it: `hidden`, or else `passage.hidden`.

        Yields:
            The logits of each row, [tokens, vocabulary], on the device of the head.
        """
        leaving = passage.hidden if hidden is None else hidden
        for row in range(len(leaving)):
            ids, mask = passage.input_ids[row : row + 1], passage.attention_mask[row : row + 1]
            state = leaving[row : row + 1].to(self.device)
            with self._standing_in(lambda *args, state=state, **kwargs: self._left(state)):
                yield self._forward(ids, mask)[0]

    def losses(self, passage: Passage, hidden: torch.Tensor | None = None) -> tuple[float, int]:
        """Sum over all tokens but the first of -log p(token | tokens before it), in nats, and their number."""
        total, count = 0.0, 0
        for row, logits in enumerate(self.logits(passage, hidden)):
            mask = passage.attention_mask[row, 1:].bool()
            labels = passage.input_ids[row, 1:][mask].to(logits.device)
            if len(labels):
                kept = logits[:-1][mask.to(logits.device)].float()
                total += float(F.cross_entropy(kept, labels, reduction="sum"))
                count += len(labels)
        return total, count

    def _forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            output = self.model(
                input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device), use_cache=False
            )
        return output.logits  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _standing_in(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Let `forward` stand in for every block."""
        own = [vars(block).get("forward") for block in self.blocks]
        try:
            for block in self.blocks:
                block.forward = forward
            yield
        finally:
            for block, old in zip(self.blocks, own, strict=True):
                del block.forward
                if old is not None:
                    block.forward = old


def carry(tensors: Sequence[torch.Tensor], folder: Path | None) -> list[torch.Tensor]:
    """Copy tensors into a file in `folder` that is mapped and gone when they are; without a folder, into memory.

    Raises:
        ResourceError: the disk of `folder` is too small.
    """
    size = sum(tensor.nbytes for tensor in tensors)
    if folder is None or size == 0:
        return [tensor.clone() for tensor in tensors]
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise os_error(error, folder) from error
        pages = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    copies, position = [], 0
    for tensor in tensors:
        copy = pages[position : position + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(copy.copy_(tensor))
        position += tensor.nbytes
    return copies


def _mapped(stored: Stored) -> torch.Tensor:
    """The tensor as a view of its file: only pages that are touched are read."""
    if stored.begin == stored.end:
        return torch.empty(stored.shape, dtype=stored.torch_dtype)
    with open(stored.file, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    piece = torch.frombuffer(pages, dtype=torch.uint8)[stored.begin : stored.end]
    if stored.begin % stored.torch_dtype.itemsize:
        piece = piece.clone()
    return piece.view(stored.torch_dtype).view(stored.shape)
