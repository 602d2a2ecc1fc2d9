"""The LLM as a teacher: run once over public text, what it said kept on disk."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch

from fedproxy.artifacts import new_file, read_json, write_json
from fedproxy.checkpoint_files import Stored, model_identity, require_space
from fedproxy.compression.heal_loss import TopTokens, top_tokens
from fedproxy.config import Heal
from fedproxy.errors import ArtifactError, ResourceError, UsageError
from fedproxy.models.block_stream import BlockStream, Passage
from fedproxy.models.families import vocabulary
from fedproxy.models.placement import open_stream
from fedproxy.models.source import Source
from fedproxy.models.text_batches import Batch
from fedproxy.tensor_files import DTYPE_NAMES, header_bytes, read_header, tensor_bytes

FILES = ("teacher.safetensors", "teacher.json")
Progress = Callable[[float, str], None]
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Data type and shape of each tensor of a file, in the order in which they lie in it."""


@dataclass(frozen=True)
class Targets:
    """What the LLM said about the tokens of some texts, one after the other.

    Attributes:
        tokens: Its next-token distributions.
        hidden: Its hidden state where each proxy block ends, each [tokens, width]; empty if they are not kept.
    """

    tokens: TopTokens
    hidden: list[torch.Tensor]


@dataclass(frozen=True)
class Teacher:
    """What the LLM said about the training texts, on disk.

    Attributes:
        tensors: Where it lies: "index", "log_p", "rest" and "hidden.NUMBER", the first extent of each counting tokens.
        starts: First token of each text, and one past the last.
        perplexity: The LLM's perplexity on the held-out texts.
    """

    tensors: dict[str, Stored]
    starts: list[int]
    perplexity: float

    def targets(self, texts: Sequence[int], device: torch.device) -> Targets:
        """Read what was said about the texts of these numbers."""
        found = {name: self._rows(stored, texts).to(device) for name, stored in self.tensors.items()}
        tokens = TopTokens(found.pop("index").long(), found.pop("log_p"), found.pop("rest"))
        return Targets(tokens, [found[name] for name in sorted(found)])

    def _rows(self, stored: Stored, texts: Sequence[int]) -> torch.Tensor:
        return torch.cat([stored.rows(self.starts[text], self.starts[text + 1]).read() for text in texts])


def ask_teacher(
    work: Path,
    source: Source,
    keep: Sequence[int],
    texts: Sequence[Batch],
    held_out: Sequence[Batch],
    settings: Heal,
    *,
    placement: str,
    progress: Progress,
) -> Teacher:
    """Run the LLM over public text and keep what it says, or find that in `work` if it was done before.

    For every token of `texts`: the likeliest next tokens, and the hidden state that enters the LLM block behind which
    each proxy block ends, that is the next kept block, or for the last proxy block what leaves the LLM's last block.

    Args:
        work: Directory to keep it in.
        source: The LLM.
        keep: The LLM blocks that the proxy has, rising.
        texts: What the proxy will be trained on.
        held_out: Texts to measure the LLM's perplexity on.
        settings: The [heal] table.
        placement: See `open_stream`.
        progress: Told the fraction done and what is being done.

    Raises:
        ArtifactError: the LLM's weights cannot be used.
        ResourceError: the disk is too small.
        UsageError: `work` holds what another LLM said, or about other text.
    """
    boundaries = [*keep[1:], source.count] if settings.hidden_weight else []
    lengths = [int(length) for batch in texts for length in batch.attention_mask.sum(dim=1)]
    description = {
        "llm": model_identity(source.path),
        "boundaries": boundaries,
        "text": _text_hash([*texts, *held_out]),
        "top_k": min(settings.top_k, vocabulary(source.decoder)),
        "temperature": settings.temperature,
    }
    file, record = (work / name for name in FILES)
    if record.is_file():
        found = read_json(record)
        check_same(found, description, work)
    else:
        perplexity = _run(file, source, boundaries, texts, held_out, settings, placement, progress)
        found = {**description, "perplexity": perplexity}
        write_json(record, found)
    tensors = {name: Stored(file, *entry) for name, entry in read_header(file).entries.items()}
    starts = list(accumulate(lengths, initial=0))
    if any(stored.shape[:1] != (starts[-1],) for stored in tensors.values()):
        raise ArtifactError(f"{file} does not fit {record}. Remove {work}, and run the command again.")
    return Teacher(tensors, starts, float(found["perplexity"]))


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], work: Path) -> None:
    """Check that unfinished work was done with the settings that are wanted now.

    Raises:
        UsageError: a value differs; each is named.
    """
    changed = [
        f"{name} was {found.get(name)}, is {value}" for name, value in wanted.items() if found.get(name) != value
    ]
    if changed:
        raise UsageError(
            f"{work} holds an unfinished healing with other settings: {'; '.join(changed)}. "
            "Give the same settings to go on with it, or remove that directory to begin anew."
        )


def perplexity_of(stream: BlockStream, texts: Sequence[Batch]) -> float:
    """Return a model's perplexity on texts, exp of the mean loss per token; the first token of a text is not counted.

    Raises:
        ArtifactError: no text has a second token.
    """
    passages = [stream.enter(batch.input_ids, batch.attention_mask) for batch in texts]
    return _perplexity(stream, passages, _through(stream, passages, lambda number, place, hidden: None))


def _perplexity(stream: BlockStream, passages: Sequence[Passage], leaving: Sequence[torch.Tensor]) -> float:
    found = [stream.losses(passage, hidden) for passage, hidden in zip(passages, leaving, strict=True)]
    total, count = (sum(values) for values in zip(*found, strict=True))
    if not count:
        raise ArtifactError("the held-out documents of the public text are shorter than two tokens. Give longer ones.")
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def _through(
    stream: BlockStream, passages: Sequence[Passage], entering: Callable[[int, int, torch.Tensor], None]
) -> list[torch.Tensor]:
    """Carry passages through all blocks; `entering` sees (block, passage, hidden state), with block = count at last."""
    states = stream.carried(passage.hidden for passage in passages)
    for passage, hidden in zip(passages, states, strict=True):
        passage.hidden = hidden
    for number, _ in stream.walk():
        for place, passage in enumerate(passages):
            entering(number, place, passage.hidden)
            passage.hidden.copy_(stream.run(number, passage))
    for place, hidden in enumerate(states):
        entering(len(stream), place, hidden)
    return states


def _run(
    file: Path,
    source: Source,
    boundaries: Sequence[int],
    texts: Sequence[Batch],
    held_out: Sequence[Batch],
    settings: Heal,
    placement: str,
    progress: Progress,
) -> float:
    """Write what the LLM says about `texts` to `file`, and return its perplexity on `held_out`."""
    stream = open_stream(source, placement)
    passages = [stream.enter(batch.input_ids, batch.attention_mask) for batch in [*texts, *held_out]]
    starts = list(accumulate((int(batch.attention_mask.sum()) for batch in texts), initial=0))
    tokens, width, dtype = starts[-1], passages[0].hidden.shape[-1], passages[0].hidden.dtype
    k = min(settings.top_k, vocabulary(source.decoder))
    layout: Layout = {
        "index": (torch.int32, (tokens, k)),
        "log_p": (torch.float32, (tokens, k)),
        "rest": (torch.float32, (tokens,)),
        **{f"hidden.{number:06d}": (dtype, (tokens, width)) for number in boundaries},
    }
    _require_space(file.parent, layout)
    with _rows_of(file, layout) as put:

        def entering(number: int, place: int, hidden: torch.Tensor) -> None:
            if number in boundaries and place < len(texts):
                put(f"hidden.{number:06d}", starts[place], hidden[passages[place].real])
            progress(0.9 * (number + (place + 1) / len(passages)) / (len(stream) + 1), "asking the LLM")

        leaving = _through(stream, passages, entering)
        for place, batch in enumerate(texts):
            row = starts[place]
            for mask, logits in zip(batch.attention_mask, stream.logits(passages[place]), strict=True):
                said = top_tokens(logits[mask.bool().to(logits.device)], k, settings.temperature)
                put("index", row, said.index.to("cpu", torch.int32))
                put("log_p", row, said.log_p.cpu())
                put("rest", row, said.rest.cpu())
                row += len(said.rest)
            progress(0.9 + 0.1 * (place + 1) / len(texts), "asking the LLM")
    return _perplexity(stream, passages[len(texts) :], leaving[len(texts) :])


def _require_space(directory: Path, layout: Layout) -> None:
    sizes = {name: dtype.itemsize * prod(shape) for name, (dtype, shape) in layout.items()}
    hidden = sum(size for name, size in sizes.items() if name.startswith("hidden"))
    try:
        require_space(directory, sum(sizes.values()))
    except ResourceError as error:
        remedy = f" With hidden_weight = 0 healing keeps {hidden / 1e9:.3g} GB less." if hidden else ""
        raise ResourceError(f"{error} Fewer steps or a smaller top_k need less.{remedy}") from error


@contextmanager
def _rows_of(file: Path, layout: Layout) -> Iterator[Callable[[str, int, torch.Tensor], None]]:
    """Give a function that writes rows of the tensors of a new safetensors file: (tensor, first row, rows)."""
    header = header_bytes({name: (DTYPE_NAMES[dtype], shape) for name, (dtype, shape) in layout.items()})
    sizes = {name: dtype.itemsize * prod(shape[1:]) for name, (dtype, shape) in layout.items()}
    begins = accumulate((sizes[name] * shape[0] for name, (_, shape) in layout.items()), initial=len(header))
    places = dict(zip(layout, begins, strict=False))
    with new_file(file) as out:

        def put(name: str, row: int, rows: torch.Tensor) -> None:
            out.seek(places[name] + row * sizes[name])
            out.write(tensor_bytes(rows))

        out.write(header)
        yield put


def _text_hash(texts: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in texts:
        for tensor in (batch.input_ids, batch.attention_mask):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor_bytes(tensor.long()))
    return digest.hexdigest()
