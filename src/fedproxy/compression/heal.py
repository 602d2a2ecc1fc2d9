"""Heal the proxy: the LLM teaches it on public text what the removed blocks did.

What healing changes stays in the proxy: fusing adds only what the clients learned on top of it.
"""

import dataclasses
import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedproxy.artifacts import os_error
from fedproxy.checkpoint_files import model_identity
from fedproxy.compression import heal_training, teacher
from fedproxy.compression.heal_student import HALF_DONE, Student
from fedproxy.compression.heal_training import Loss, distil
from fedproxy.compression.teacher import ask_teacher, perplexity_of
from fedproxy.config import Heal
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models.checkpoints import Tokenizer, padding
from fedproxy.models.encoding import Encoded
from fedproxy.models.families import readable, vocabulary
from fedproxy.models.loading import release
from fedproxy.models.placement import open_stream
from fedproxy.models.source import Source, open_source
from fedproxy.models.text_batches import Batch, batches
from fedproxy.seeds import derive_seed

_MOST_LOSSES = 100
_TAUGHT, _TRAINED = 0.4, 0.9
"""Progress when the LLM has been asked, and when the proxy is trained."""


def heal(
    source: Source,
    keep: Sequence[int],
    proxy: Path,
    *,
    trained: Sequence[int],
    settings: Heal,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    work: Path,
    seed: int,
    placement: str = "auto",
    progress: Callable[[float, str], None],
) -> dict[str, Any]:
    """Train a pruned proxy on the LLM's predictions and hidden states, and replace its weights.

    Killed at any moment and called again with the same arguments (and a proxy pruned anew), it goes on where it was
    and ends in the same bits on the same machine. `discard` removes `work` once the proxy is safe on disk. Weights of
    the LLM that `source` held in memory are let go.

    Args:
        source: The LLM.
        keep: The LLM blocks that the proxy has, rising.
        proxy: Directory of the pruned proxy's checkpoint; only its weight files are replaced.
        trained: Proxy blocks that are changed.
        settings: The [heal] table, with at least one step; its `text` is what `documents` come from.
        documents: Public text.
        tokenizer: The LLM's.
        work: Directory for what is unfinished, on the disk of `proxy`; made if it is missing.
        seed: Seed of the held-out documents, the order of the others, and the LoRA adapter's beginning.
        placement: Where the LLM is run; see `open_stream`.
        progress: Told the fraction done and what is being done.

    Returns:
        For the record: the settings, losses, perplexity of the LLM and of the proxy before and after on the held-out
        documents, and the seconds that this process took.

    Raises:
        ArtifactError: the LLM, the proxy or the text cannot be used, or `work` is damaged.
        UsageError: a setting is impossible, the training diverged, or `work` holds a healing with other settings or
            something else.
        ResourceError: the disk is too small.
    """
    began = time.perf_counter()
    check_healing(settings, trained)
    learned, held_out = split_documents(documents, settings, seed, wanted=settings.steps * settings.batch_size)
    asked, unseen = (in_batches(source, part, settings, tokenizer) for part in (learned, held_out))
    _enter(work)

    said = ask_teacher(
        work,
        source,
        keep,
        asked,
        unseen,
        settings,
        placement=placement,
        progress=lambda done, text: progress(_TAUGHT * done, text),
    )
    release(source.decoder)

    def healed() -> Source:
        return open_source(proxy, trust_remote_code=source.trust_remote_code)

    def perplexity() -> float:
        return perplexity_of(open_stream(healed(), placement), unseen)

    def on_step(step: int, loss: Loss) -> None:
        done = _TAUGHT + (_TRAINED - _TAUGHT) * step / settings.steps
        progress(done, f"healing, step {step} of {settings.steps}, KL {loss.divergence:.3f}")

    before, identity, texts = perplexity(), model_identity(proxy), texts_of(asked)
    longest = readable(source.decoder.config, settings.max_length)
    student = Student(healed(), settings, trained, seed=derive_seed(seed, "heal"), longest=longest)
    losses = distil(
        student, said, texts, settings, proxy=identity, pad=padding(tokenizer), seed=seed, work=work, on_step=on_step
    )
    progress(_TRAINED, "writing the healed proxy")
    student.write(work)
    parameters = sum(parameter.numel() for parameter in student.parameters.values())
    del student
    after = perplexity()
    if not math.isfinite(after):
        raise UsageError(f"healing: the perplexity of the healed proxy is {after}. Give a lower learning_rate.")
    progress(1.0, "proxy healed")
    return {
        "settings": {**dataclasses.asdict(settings), "learning_rate": settings.highest_rate},
        "documents": len(learned),
        "tokens": sum(len(text.ids) for text in texts),
        "trained": list(trained),
        "parameters": parameters,
        "held_out": len(held_out),
        "losses": thinned(losses),
        "perplexity": {"llm": said.perplexity, "before": before, "after": after},
        "seconds": round(time.perf_counter() - began, 3),
    }


def discard(work: Path) -> None:
    """Remove what `heal` kept for going on; call it once the proxy is safe on disk."""
    shutil.rmtree(work, ignore_errors=True)


def split_documents(documents: Sequence[str], settings: Heal, seed: int, *, wanted: int) -> tuple[list[str], list[str]]:
    """Draw the documents to learn from and those held out; none is in both, repeated ones count once.

    Returns:
        As many documents to learn from as are wanted, if there are, and at most a quarter of all, held out.

    Raises:
        ArtifactError: there are fewer than two different documents.
    """
    order = list(dict.fromkeys(documents))
    random.Random(derive_seed(seed, "heal", "documents")).shuffle(order)
    if len(order) < 2:
        raise ArtifactError("healing needs two different public documents at least; give some hundred.")
    count = max(1, min(settings.held_out, len(order) // 4))
    return order[count:][:wanted], order[:count]


def in_batches(source: Source, documents: Sequence[str], settings: Heal, tokenizer: Tokenizer) -> list[Batch]:
    """Public text as the models read it.

    Raises:
        ArtifactError: the tokenizer makes tokens that the LLM does not know.
    """
    longest = readable(source.decoder.config, settings.max_length)
    found = batches(tokenizer, documents, max_length=longest, batch_size=settings.batch_size)
    known, highest = vocabulary(source.decoder), max(int(batch.input_ids.max()) for batch in found)
    if highest >= known:
        raise ArtifactError(f"{source.path}: the tokenizer makes token {highest}, the model knows {known} tokens.")
    return found


def check_healing(settings: Heal, trained: Sequence[int]) -> None:
    """Check the settings of a healing that changes the proxy blocks `trained`.

    Raises:
        UsageError: there are no steps and nothing is refitted, or no block may be changed.
    """
    if not trained:
        raise UsageError(
            "heal: spare_ends = true leaves no block of the proxy to heal. Keep fewer ends, or remove less."
        )
    if settings.steps < 1 and settings.refit < 1:
        raise UsageError(f"healing needs steps ≥ 1 or refit ≥ 1, got {settings.steps} and {settings.refit}.")


def _enter(work: Path) -> None:
    """Make the directory, and clear it of what a killed process was about to write."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        half, rest = work / HALF_DONE, [item for item in work.iterdir() if item.name != HALF_DONE]
        unfinished = [item for item in rest if item.name.startswith(".") and ".tmp-" in item.name]
        known = {*teacher.FILES, heal_training.FILE, *(item.name for item in unfinished)}
        if foreign := sorted({item.name for item in rest} - known):
            raise UsageError(f"{work} holds {', '.join(foreign[:3])}, which is not of healing. Move it elsewhere.")
        if half.exists():
            shutil.rmtree(half)
        for item in unfinished:
            item.unlink()
    except OSError as error:
        raise os_error(error, work) from error


def texts_of(asked: Sequence[Batch]) -> list[Encoded]:
    """The texts one by one, in the teacher's order."""
    return [
        Encoded(ids[mask.bool()].tolist(), 1)
        for batch in asked
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def thinned(losses: Sequence[Loss]) -> list[dict[str, float]]:
    """At most a hundred points of the curve: means over stretches of equal length, each with its last step."""
    stretch = math.ceil(len(losses) / _MOST_LOSSES)
    points = []
    for start in range(0, len(losses), stretch):
        part = losses[start : start + stretch]
        points.append(
            {
                "step": start + len(part),
                "divergence": sum(loss.divergence for loss in part) / len(part),
                "hidden": sum(loss.hidden for loss in part) / len(part),
            }
        )
    return points
