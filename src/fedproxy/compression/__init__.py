"""Compress an LLM into a proxy: score its blocks on public text, remove the least important, keep all else."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fedproxy.artifacts import Manifest, model_identity, new_directory
from fedproxy.compression.calibrate import batches, draw, read_documents
from fedproxy.compression.prune import write_proxy
from fedproxy.compression.scores import SCORES
from fedproxy.compression.select import check_remove, select
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models.checkpoints import load_model, load_tokenizer, resolve
from fedproxy.models.families import blocks_path, vocabulary

__all__ = ["SCORES", "Proxy", "compress"]

_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Proxy:
    """A proxy on disk.

    Attributes:
        path: Its checkpoint.
        layer_map: Position = proxy block, value = LLM block, 0-based.
        scores: Score of every LLM block.
    """

    path: Path
    layer_map: list[int]
    scores: list[float]


def compress(
    llm: str | Path,
    out: str | Path,
    *,
    remove: float = 0.5,
    calibration: str | Path,
    score: str = "block-influence",
    samples: int = 512,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    overwrite: bool = False,
    on_progress: Callable[[float, str], None] | None = None,
) -> Proxy:
    """Write the proxy of an LLM: a Hugging Face checkpoint with tokenizer and `fedproxy.json`.

    Args:
        llm: The LLM: directory or Hub id.
        out: Directory to write.
        remove: Share of the blocks to remove, from 0 to below 1; the number is rounded down.
        calibration: Public text to score the blocks on: text with a blank line between documents, or JSON Lines.
        score: Name in `SCORES`.
        samples: Number of documents to draw.
        max_length: Tokens of a document to use at most.
        batch_size: Documents in one forward pass.
        seed: Seed of the draw.
        overwrite: Replace `out`.
        on_progress: Told the fraction done and what is being done.

    Returns:
        The proxy.

    Raises:
        ArtifactError: the LLM or the calibration text cannot be used.
        UsageError: a setting is impossible, or `out` exists or cannot be written.

    Reference:
        FedProxy, Eq. 4.
    """
    report = on_progress or (lambda fraction, text: None)
    check_remove(remove)
    if score not in SCORES:
        raise UsageError(f"unknown score {score!r}; there are: {', '.join(sorted(SCORES))}.")
    documents, calibration_sha256 = read_documents(Path(calibration))
    documents = draw(documents, samples, seed)
    with new_directory(Path(out), overwrite=overwrite) as directory:
        report(0.0, "loading the LLM")
        source = resolve(llm)
        model, tokenizer = load_model(source), load_tokenizer(source)
        blocks_path(model)
        positions = getattr(model.config, "max_position_embeddings", None) or max_length
        text = batches(tokenizer, documents, max_length=min(max_length, positions), batch_size=batch_size)
        known, highest = vocabulary(model), max(int(batch.input_ids.max()) for batch in text)
        if highest >= known:
            raise ArtifactError(f"{llm}: the tokenizer makes token {highest}, the model knows {known} tokens.")
        torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
        scores = SCORES[score](model, text, lambda done: report(0.1 + 0.8 * done, "scoring the blocks"))
        torch.nn.Module.to(model, "cpu")
        keep = select(scores, remove)
        report(0.9, f"writing the proxy of {len(keep)} blocks")
        parameters = write_proxy(directory, model, source, keep, text[-1].input_ids[-1:, :_PROBE_TOKENS])
        Manifest(
            kind="proxy",
            llm_sha256=model_identity(source),
            llm_blocks=len(scores),
            layer_map=keep,
            scores=scores,
            settings={
                "remove": remove,
                "score": score,
                "samples": len(documents),
                "max_length": max_length,
                "parameters": parameters,
            },
            seed=seed,
            calibration_sha256=calibration_sha256,
        ).write(directory)
    report(1.0, "proxy written")
    return Proxy(Path(out), keep, scores)
