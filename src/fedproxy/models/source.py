"""An LLM as the stages see it: its text decoder, and where the weights of each block lie, on disk or in memory."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedproxy.checkpoint_files import Checkpoint, Stored, numbered_lists, open_checkpoint, split_number
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models.checkpoints import Model, build_skeleton, load_model, load_skeleton, resolve
from fedproxy.models.families import blocks, blocks_path, check_plain
from fedproxy.tensor_files import DTYPE_NAMES


@dataclass(frozen=True)
class Held(Stored):
    """A tensor in memory, where others lie in a file; `begin` and `end` are its addresses."""

    tensor: torch.Tensor = field(compare=False, repr=False)

    def read(self) -> torch.Tensor:
        """The tensor, on the CPU."""
        return self.tensor.detach().cpu()


@dataclass(frozen=True)
class Source:
    """An LLM that can be compressed and fused; of one on disk no weight is loaded.

    Attributes:
        path: Its directory; of a model that came without one, its class in angle brackets.
        files: Where its tensors lie.
        whole: The model as transformers loads it, on the meta device.
        decoder: Its text decoder, on the meta device; `whole` itself unless that is multimodal.
        blocks_path: Where the blocks live in `decoder`, as in "model.layers".
        stored_path: Where they live in the files, as in "model.layers", "h" or "language_model.model.layers".
        trust_remote_code: Whether the checkpoint's own Python code may run.
        loaded: Whether the weights are in memory.
    """

    path: Path
    files: Checkpoint
    whole: Model
    decoder: Model
    blocks_path: str
    stored_path: str
    trust_remote_code: bool = False
    loaded: bool = False

    @property
    def multimodal(self) -> bool:
        """Whether the decoder is only a part of the model."""
        return self.decoder is not self.whole

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(blocks(self.decoder))

    def decoder_name(self, name: str) -> str | None:
        """The name of a stored tensor in a checkpoint of the decoder alone; none if it is of another part."""
        if not self.multimodal:
            return name
        stored, own = self.stored_path.rpartition(".")[0] + ".", self.blocks_path.rpartition(".")[0] + "."
        if name.startswith(stored):
            return own + name.removeprefix(stored)
        head = "lm_head.weight"
        return head if name == head or name.endswith(f".{head}") else None

    def block_tensors(self, number: int) -> dict[str, Stored]:
        """The stored tensors of one block, by their names in the decoder."""
        return {name: stored for name, stored in self._decoder_tensors().items() if self.block_of(name) == number}

    def outer_tensors(self) -> dict[str, Stored]:
        """The stored tensors outside the blocks, by their names in the decoder."""
        return {name: stored for name, stored in self._decoder_tensors().items() if self.block_of(name) is None}

    def block_of(self, name: str) -> int | None:
        """The block that a tensor of the decoder belongs to."""
        parts = split_number(name)
        path = self.blocks_path if self.multimodal else self.stored_path
        return parts[1] if parts is not None and parts[0] == path else None

    def _decoder_tensors(self) -> dict[str, Stored]:
        named = ((self.decoder_name(name), stored) for name, stored in self.files.tensors.items())
        return {name: stored for name, stored in named if name is not None}


def open_source(llm: str | Path | Model, *, trust_remote_code: bool = False, load: bool = False) -> Source:
    """Look at an LLM.

    Args:
        llm: Directory or Hub id; or a causal language model in memory, which is put into evaluation state.
        trust_remote_code: Let the checkpoint's own Python code run.
        load: Have its weights in memory, where those of a model in memory are.

    Raises:
        ArtifactError: it is no checkpoint, is damaged, or of a sort that can be neither compressed nor fused; the error
            says what to do.
        UsageError: it is no model of transformers, has an adapter, or is not to be in memory.
    """
    if not isinstance(llm, str | Path):
        if not load:
            raise UsageError("What is made of a model in memory stays in memory: leave out away, or give a directory.")
        return _hold(llm, Path(f"<{type(llm).__name__}>"))
    path = resolve(llm)
    if load:
        return _hold(load_model(path, trust_remote_code=trust_remote_code), path)
    whole = load_skeleton(path, trust_remote_code=trust_remote_code)
    files = open_checkpoint(path)
    blocks_path(whole)
    text = whole.config.get_text_config(decoder=True)
    decoder = whole
    if text is not whole.config:
        decoder = build_skeleton(path, text, files.dtype)
    inner = blocks_path(decoder)
    return Source(path, files, whole, decoder, inner, _stored_path(files, decoder, inner), trust_remote_code)


def _hold(model: Model, path: Path) -> Source:
    check_plain(model)
    name = type(model).__name__
    inner, text = blocks_path(model), model.config.get_text_config(decoder=True)
    away = any(weight.is_meta for weight in model.parameters())
    if text is not model.config or getattr(model, "is_quantized", False) or away:
        raise ArtifactError(f"{name} is multimodal, quantised, or not wholly in memory. Give a checkpoint's directory.")
    tensors: dict[str, Stored] = {}
    for key, weight in model.named_parameters():
        begin = weight.data_ptr()
        place = (path, DTYPE_NAMES[weight.dtype], tuple(weight.shape), begin, begin + weight.nbytes)
        tensors[key] = Held(*place, weight)
    files = Checkpoint(path, model.config.to_dict(), (tensors,))
    return Source(path, files, model.train(False), model, inner, inner, loaded=True)


def _stored_path(files: Checkpoint, decoder: Model, path: str) -> str:
    """The list of the files that holds the decoder's blocks: as long, and with the most names in common."""
    count = len(blocks(decoder))
    wanted = {name for name, _ in blocks(decoder)[0].named_parameters()}
    shared: dict[str, int] = {}
    for candidate, numbers in numbered_lists(files.tensors).items():
        if numbers == set(range(count)):
            rests = {parts[2] for parts in map(split_number, files.tensors) if parts and parts[:2] == (candidate, 0)}
            shared[candidate] = len(rests & wanted)
    if not shared:
        raise ArtifactError(f"{files.path}: the weights of the blocks at {path!r} were not found in the files.")
    return max(sorted(shared), key=lambda candidate: shared[candidate])
