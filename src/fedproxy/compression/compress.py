"""Compress an LLM into a proxy: score its blocks on public text, remove the least important, keep all else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedproxy.artifacts import Manifest, check_output, new_directory
from fedproxy.checkpoint_files import model_identity
from fedproxy.compression.exposure import exposure, perplexities
from fedproxy.compression.heal import discard
from fedproxy.compression.heal import heal as heal_proxy
from fedproxy.compression.prune import check_proxy, prune
from fedproxy.compression.refit import check_layers, refit
from fedproxy.compression.scores import SCORES
from fedproxy.compression.select import between, check_remove, removed_count
from fedproxy.config import Heal
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.models.block_stream import BlockStream, Passage
from fedproxy.models.checkpoints import Model, Tokenizer, load_tokenizer
from fedproxy.models.families import keep_blocks, readable, vocabulary
from fedproxy.models.placement import check_placement, open_stream
from fedproxy.models.source import open_source
from fedproxy.models.text_batches import batches
from fedproxy.public_text import draw, read_documents

__all__ = ["SCORES", "Proxy", "compress"]

MEASURED = 64
"""Documents that the perplexity of the exposure sheet is measured on, about."""


@dataclass(frozen=True)
class Proxy:
    """A proxy, on disk or in memory.

    Attributes:
        path: Its checkpoint; none if it is in memory.
        layer_map: Position = proxy block, value = LLM block, 0-based.
        scores: Score of every LLM block.
        model: The proxy in memory; it shares no weight with the LLM.
    """

    path: Path | None
    layer_map: list[int]
    scores: list[float]
    model: Model | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Text:
    """The public text that blocks are scored on.

    Attributes:
        documents: The documents drawn.
        sha256: SHA-256 of the file they come from.
    """

    documents: list[str]
    sha256: str


def read_text(calibration: str | Path | Sequence[str] | None, score: str, samples: int, seed: int) -> Text | None:
    """Read the public text and draw from it; none if there is none and the score needs none.

    Raises:
        UsageError: there is no such score, or it needs text and none is given.
        ArtifactError: the text cannot be read.
    """
    SCORES.choose(score)
    if calibration is None:
        if SCORES[score].reads_text:
            raise UsageError(f"The score {score!r} needs public text: give calibration = FILE.")
        return None
    documents, sha256 = read_documents(calibration)
    return Text(draw(documents, samples, seed), sha256)


def enter(
    stream: BlockStream, tokenizer: Tokenizer | None, text: Text | None, *, max_length: int, batch_size: int
) -> list[Passage]:
    """Put public text before the first block of a decoder.

    Raises:
        ArtifactError: the tokenizer makes tokens that the model does not know.
    """
    if text is None or tokenizer is None:
        return []
    longest = readable(stream.model.config, max_length)
    found = batches(tokenizer, text.documents, max_length=longest, batch_size=batch_size)
    known, highest = vocabulary(stream.model), max(int(batch.input_ids.max()) for batch in found)
    if highest >= known:
        raise ArtifactError(f"the tokenizer makes token {highest}, the model knows {known} tokens.")
    return [stream.enter(batch.input_ids, batch.attention_mask) for batch in found]


def compress(
    llm: str | Path | Model,
    out: str | Path | None = None,
    *,
    remove: float = 0.5,
    calibration: str | Path | Sequence[str] | None = None,
    score: str = "block-influence",
    keep_first: int = 0,
    keep_last: int = 0,
    samples: int = 512,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    placement: str = "auto",
    heal: Heal | None = None,
    tokenizer: Tokenizer | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[float, str], None] | None = None,
    on_sheet: Callable[[dict[str, Any]], None] | None = None,
) -> Proxy:
    """Make the proxy of an LLM: a Hugging Face checkpoint with tokenizer and `fedproxy.json`, or a model in memory.

    For a checkpoint the LLM is never loaded as a whole unless there is room for it: blocks are scored one after the
    other, and the proxy's tensors are copied as bytes.

    Args:
        llm: The LLM: directory or Hub id; or, without `out`, a model in memory, which is put into evaluation state.
        out: Directory to write; if none, nothing is written, and the proxy is the result's `model`.
        remove: Share of the blocks to remove, from 0 to below 1; the number is rounded down, but above 0 not to none.
        calibration: Public text to score the blocks on: text with a blank line between documents, or JSON Lines; or a
            list of documents. Scores that read no text do without.
        score: Name in `SCORES`.
        keep_first: Blocks at the beginning that are kept whatever they score.
        keep_last: Blocks at the end, likewise.
        samples: Number of documents to draw.
        max_length: Tokens of a document to use at most.
        batch_size: Documents in one forward pass.
        seed: Seed of the draw.
        placement: Where the LLM is run: "memory", "stream" (one block at a time from its files), or "auto".
        heal: How the LLM teaches the proxy on public text afterwards; not at all if none, or with 0 for `refit` and
            `steps`. Killed, and called again with the same arguments, it goes on from `out`.heal beside `out`.
        tokenizer: The tokenizer of a model in memory; a checkpoint brings its own.
        trust_remote_code: Let the LLM's own Python code run.
        overwrite: Replace `out`, if fedproxy made it.
        on_progress: Told the fraction done and what is being done.
        on_sheet: Told the exposure sheet (what leaves the house) before anything is written.

    Returns:
        The proxy.

    Raises:
        ArtifactError: the LLM or the calibration text cannot be used.
        UsageError: a setting is impossible or misses another, or `out` exists, cannot be written, or is, holds or lies
            in what is read.
        ResourceError: memory or disk do not suffice.

    Example:
        `compress(model, tokenizer=tokenizer, calibration=texts).model` is `model` with half of its blocks.

    Reference:
        FedProxy, Eq. 4.
    """
    report = on_progress or (lambda fraction, text: None)
    check_remove(remove)
    check_placement(placement)
    text = read_text(calibration, score, samples, seed)
    inputs = (llm, calibration, heal and heal.text)
    heal = heal if heal is not None and (heal.steps or heal.refit) else None
    lessons = [] if heal is None else _documents(heal.text or calibration)
    if out is not None:
        out = Path(out)
        check_output(out, [path for path in inputs if path and isinstance(path, str | Path)], overwrite=overwrite)
    elif heal is not None:
        raise UsageError("Healing keeps what the LLM teaches beside the proxy on disk: give out, or heal nothing.")
    report(0.0, "looking at the LLM")
    source = open_source(llm, trust_remote_code=trust_remote_code, load=out is None)
    if isinstance(llm, str | Path):
        tokenizer = load_tokenizer(source.path, trust_remote_code=trust_remote_code)
    elif text is not None and tokenizer is None:
        raise UsageError(f"{source.path} is to read text: give the tokenizer that belongs to it.")
    stream = open_stream(source, placement)
    passages = enter(stream, tokenizer, text, max_length=max_length, batch_size=batch_size)
    most = removed_count(source.count, remove)
    if heal is not None and not heal.steps and not most:
        heal = None  # a refit has no gap to fit
    if heal is not None and heal.refit and most and passages:
        check_layers(stream, passages[0])
    among = between(source.count, keep_first, keep_last, most)
    importance = SCORES[score].score(
        stream,
        passages,
        most=most,
        among=among,
        seed=seed,
        progress=lambda done: report(0.02 + 0.5 * done, "scoring the blocks"),
    )
    keep = sorted(set(range(source.count)) - set(importance.removals[most]))
    report(0.52, "measuring what leaves the house")
    some = passages[:: max(1, len(passages) * batch_size // MEASURED)]
    perplexity = perplexities(stream, some, keep) if some else None
    sheet = exposure(source, keep, perplexity=perplexity, healed=heal is not None)
    if on_sheet is not None:
        on_sheet(sheet)
    if out is None:
        model = keep_blocks(source.decoder, keep)
        check_proxy(source, keep, model)
        report(1.0, "proxy made")
        return Proxy(None, keep, importance.scores, model)
    settings: dict[str, Any] = {
        "remove": remove,
        "score": score,
        "keep_first": keep_first,
        "keep_last": keep_last,
        "samples": 0 if text is None else len(text.documents),
        "max_length": max_length,
        "parameters": sheet["parameters"],
        "healed": heal is not None,
        "exposure": sheet,
    }
    work = out.parent / f"{out.name}.heal"
    with new_directory(out, overwrite=overwrite) as directory:
        begun, pruned, size = 0.55, 0.65 if heal is not None else 0.9, max(1, sheet["bytes"])
        writing = f"writing the proxy of {len(keep)} blocks"
        prune(source, keep, directory, on_bytes=lambda done: report(begun + (pruned - begun) * done / size, writing))
        report(pruned, "checking the proxy's blocks against the LLM's")
        check_proxy(source, keep, directory)
        if heal is not None and tokenizer is not None:
            del stream, passages, some
            teaching: dict[str, Any] = {
                "trained": [place for place, block in enumerate(keep) if block in among or not heal.spare_ends],
                "settings": heal,
                "documents": lessons,
                "tokenizer": tokenizer,
                "seed": seed,
                "placement": placement,
            }
            if heal.refit:
                settings["refit"] = refit(
                    source,
                    keep,
                    directory,
                    **teaching,
                    progress=lambda done: report(0.7 + 0.05 * done, "refitting the layers before the gaps"),
                )
            if heal.steps:
                settings["heal"] = heal_proxy(
                    source,
                    keep,
                    directory,
                    **teaching,
                    work=work,
                    progress=lambda done, text: report(0.75 + 0.25 * done, text),
                )
        Manifest(
            kind="proxy",
            llm_sha256=model_identity(source.path),
            llm_blocks=source.count,
            layer_map=keep,
            scores=importance.scores,
            settings=settings,
            seed=seed,
            calibration_sha256=None if text is None else text.sha256,
        ).write(directory)
    if heal is not None:
        discard(work)
    report(1.0, "proxy written")
    return Proxy(out, keep, importance.scores)


def _documents(text: str | Path | Sequence[str] | None) -> list[str]:
    if text is None:
        raise UsageError("Healing needs public text: give calibration = FILE, or a text of its own.")
    return read_documents(text)[0]
