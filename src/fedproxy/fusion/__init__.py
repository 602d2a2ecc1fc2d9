"""Fuse a federated adapter, trained on the proxy, into the LLM: as an adapter for it, or as a merged checkpoint."""

import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedproxy.adapter_checks import check_finite, is_lora, parameter_name
from fedproxy.adapter_files import WEIGHTS_FILE, write_adapter
from fedproxy.artifacts import MANIFEST, Manifest, check_output, new_directory
from fedproxy.checkpoint_files import Stored, model_identity
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.fusion.model_card import write_card
from fedproxy.fusion.plug_in import TaskVector, on_whole, rekey_adapter, rekey_config
from fedproxy.fusion.scale import GRID, best_scale, scale_curve
from fedproxy.layer_map import check_layer_map
from fedproxy.models.checkpoints import Model, Tokenizer, hub_id, load_tokenizer
from fedproxy.models.families import blocks_path, readable
from fedproxy.models.lora import (
    AdaptedModel,
    AdapterConfig,
    check_base,
    check_fits,
    held_adapter,
    put_on,
    read_any_adapter,
    without_defaults,
)
from fedproxy.models.merging import merge_adapter, stored_weights
from fedproxy.models.placement import open_stream
from fedproxy.models.source import Source, open_source
from fedproxy.models.text_batches import batches
from fedproxy.public_text import draw, read_documents
from fedproxy.tensors import digest

__all__ = ["AUTO", "FORMS", "GRID", "fuse", "serving_note"]

KINDS = {"adapter": "llm-adapter", "checkpoint": "fused"}
"""Kind of artifact of each form."""
FORMS = tuple(KINDS)
AUTO = "auto"
Adapter = str | Path | AdaptedModel | Mapping[str, torch.Tensor]
_BATCH = 8


def fuse(
    llm: str | Path | Model,
    adapter: Adapter,
    out: str | Path | None = None,
    *,
    form: str = "adapter",
    scale: float | str = 1.0,
    public: str | Path | Sequence[str] | None = None,
    samples: int = 64,
    max_length: int = 256,
    proxy: str | Path | None = None,
    layer_map: Sequence[int] | None = None,
    config: AdapterConfig | None = None,
    tokenizer: Tokenizer | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[float, str], None] = lambda fraction, text: None,
) -> Any:
    """Put the task vector of each proxy block onto the LLM block it came from.

    Both forms hold the same model: the adapter, merged by PEFT, gives the checkpoint. The checkpoint is written as a
    stream: only touched tensors are decoded, a few rows at a time. The adapter has standard keys and one rank for all
    its layers, as servers of LoRA adapters (vLLM) take it, unless it holds trained biases or saved modules
    (`serving_note`).

    What is added is always a task vector. Of biases and saved modules, whose trained values the adapter holds, it is
    the trained value less the proxy's own; an unhealed proxy's own values are the LLM's, a healed proxy must be given.

    With `scale="auto"` the scale is the one of `GRID` with the lowest loss on public text, without training. Text of
    another sort than the clients' tasks favours small scales: it can show what a scale breaks, not what it teaches.

    Args:
        llm: The LLM that the proxy was made from: directory or Hub id; or, without `out`, a model in memory.
        adapter: An adapter trained on the proxy: its directory, the proxy with it (a PeftModel), or its state dict. The
            directory may be one that PEFT or TRL wrote; then the proxy must be given.
        out: Directory to write; if none, nothing is written, and the fused model is in memory.
        form: "adapter" (a PEFT adapter for the untouched LLM) or "checkpoint" (the LLM with merged weights); of a model
            in memory a PeftModel around that very model, or a copy.
        scale: Factor of the task vector, or "auto".
        public: Public text to choose the scale by: a file, or a list of documents.
        samples: Documents to draw from it.
        max_length: Tokens of a document at most.
        proxy: The proxy, needed for an adapter that PEFT or TRL wrote, and for biases and saved modules that were
            trained on a healed one.
        layer_map: The proxy's, for an adapter in memory; one on disk says it itself.
        config: The LoraConfig of a state dict.
        tokenizer: The tokenizer of a model in memory, to choose the scale with.
        trust_remote_code: Let the LLM's own Python code run.
        overwrite: Replace `out`, if fedproxy made it.
        on_progress: Told the fraction done, and what is being done.

    Returns:
        The directory written, or the fused model in evaluation state.

    Raises:
        ArtifactError: the LLM or the adapter is damaged, or the adapter is of another LLM or layer map, already fused,
            or does not fit. Of a model in memory the shapes alone tell whether it is another LLM.
        UsageError: a setting is impossible or misses another, or `out` exists, cannot be written, or is, holds or lies
            in what is read.
        ResourceError: the disk is too small, or full.

    Example:
        `fuse(llm, tuned_proxy, layer_map=proxy.layer_map)` is a PeftModel of `llm`.

    Reference:
        FedProxy, Eq. 15 (docs/method.md).
    """
    _check_settings(form, scale, public)
    if out is not None:
        inputs = [path for path in (llm, adapter, public, proxy) if path and isinstance(path, str | Path)]
        check_output(Path(out), inputs, overwrite=overwrite)
    record, tensors, manifest = _read(adapter, layer_map, config, proxy)
    source = open_source(llm, trust_remote_code=trust_remote_code, load=out is None)
    manifest = _settled(source, manifest)
    if proxy is not None:
        check_base(Path(proxy), manifest)
    moved = rekey_adapter(tensors, manifest.layer_map, source.blocks_path)
    check_fits(source.decoder, moved, record)
    vector = TaskVector(moved, *_whereabouts(source, dict(zip(moved, tensors, strict=True)), manifest, proxy))
    settings = dict(manifest.settings)
    if scale == AUTO:
        assert public is not None
        documents, settings["public_sha256"] = read_documents(public)
        if isinstance(llm, str | Path):
            tokenizer = load_tokenizer(source.path, trust_remote_code=trust_remote_code)
        elif tokenizer is None:
            raise UsageError(f"{source.path} is to read public text: give the tokenizer that belongs to it.")
        documents = draw(documents, samples, manifest.seed)
        text = batches(tokenizer, documents, max_length=readable(source.decoder.config, max_length), batch_size=_BATCH)
        curve = scale_curve(
            open_stream(source),
            vector,
            record,
            text,
            on_block=lambda number: on_progress((number + 1) / source.count / 2, f"scales: block {number + 1}"),
        )
        settings["scale_curve"] = [[factor, loss if math.isfinite(loss) else None] for factor, loss in curve]
        scale = best_scale(curve)
    settings["scale"] = scale
    tensors = vector.at(float(scale))
    if out is None:
        on_progress(1.0, "done")
        return _in_memory(source, record, tensors, form)
    manifest = replace(manifest, kind=KINDS[form], settings=settings)
    with new_directory(Path(out), overwrite=overwrite) as directory:
        _write(directory, source, record, tensors, manifest, on_progress)
        write_card(
            directory,
            manifest,
            base_model=hub_id(source.path),
            auto_class="AutoModelForImageTextToText" if source.multimodal else "AutoModelForCausalLM",
        )
    on_progress(1.0, "done")
    return Path(out)


def serving_note(config: Mapping[str, Any]) -> str | None:
    """What to know before an adapter with this PEFT configuration goes to a server of LoRA adapters, if anything."""
    held = [name for name in ("bias", "modules_to_save") if config.get(name) not in (None, "none")]
    if not held:
        return None
    return (
        f"The adapter uses {' and '.join(held)}, which PEFT loads and LoRA servers such as vLLM do not. "
        "For those, fuse to a checkpoint."
    )


def _check_settings(form: str, scale: float | str, public: str | Path | Sequence[str] | None) -> None:
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r}; there are: {', '.join(FORMS)}.")
    if scale == AUTO:
        if public is None:
            raise UsageError("scale = auto needs public text to choose the scale by. Give it with --public FILE.")
        return
    if isinstance(scale, str) or not math.isfinite(scale):
        raise UsageError(f"scale must be a finite number or {AUTO}, got {scale}.")
    if public is not None:
        raise UsageError(f"public text is only for scale = {AUTO}; scale is {scale}. Leave one of them out.")


def _read(
    adapter: Adapter, layer_map: Sequence[int] | None, config: AdapterConfig | None, proxy: str | Path | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor], Manifest]:
    """An adapter's PEFT configuration, tensors and manifest; of one in memory the manifest names no LLM yet."""
    if isinstance(adapter, str | Path) is (layer_map is not None):
        raise UsageError(
            f"an adapter in memory needs the proxy's layer_map, one on disk says it; given is {layer_map}."
        )
    if isinstance(adapter, str | Path):
        record, tensors, manifest = read_any_adapter(Path(adapter), None if proxy is None else Path(proxy))
        with open(Path(adapter) / WEIGHTS_FILE, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        manifest = Manifest("proxy-adapter", "", 0, list(layer_map or ()))
        record, tensors = held_adapter(adapter, config, manifest)
        sha256 = digest(tensors)
    return record, tensors, replace(manifest, settings={**manifest.settings, "adapter_sha256": sha256})


def _settled(source: Source, manifest: Manifest) -> Manifest:
    """Check that an adapter is of this LLM, as far as both are known; the manifest, naming the LLM."""
    llm, adapter_sha256 = source.path, manifest.settings["adapter_sha256"]
    if manifest.kind != "proxy-adapter":
        raise ArtifactError("the adapter counts LLM blocks already: it is fused. Load it on the LLM with PEFT.")
    sha256 = model_identity(llm) if llm.is_dir() else ""
    if not manifest.llm_blocks:
        check_layer_map(manifest.layer_map, source.count)
        return replace(manifest, llm_sha256=sha256, llm_blocks=source.count)
    if sha256 and (llm / MANIFEST).is_file() and Manifest.read(llm).settings.get("adapter_sha256") == adapter_sha256:
        raise ArtifactError(f"{llm} holds this adapter already. Fuse it into the LLM it came from.")
    if sha256 and sha256 != manifest.llm_sha256:
        raise ArtifactError(
            f"the adapter belongs to another LLM (sha256 {manifest.llm_sha256[:12]}…) than {llm} ({sha256[:12]}…)."
        )
    if source.count != manifest.llm_blocks:
        raise ArtifactError(f"{llm} has {source.count} blocks, the adapter's LLM has {manifest.llm_blocks}.")
    return manifest


def _whereabouts(
    source: Source, names: Mapping[str, str], manifest: Manifest, proxy: str | Path | None
) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """Where the proxy's values before training, and the LLM's, of trained weights lie.

    `names` says for each adapter tensor's name on the LLM its name on the proxy.
    """
    names = {name: old for name, old in names.items() if not is_lora(name)}
    if not names:
        return {}, {}
    if proxy is None and manifest.settings.get("healed"):
        raise UsageError(
            f"the adapter holds trained values of {parameter_name(next(iter(names)))!r} and other weights of a healed "
            "proxy. What was learned is their difference to the proxy's own: give the proxy with --proxy DIR."
        )

    def found(where: Source, wanted: Mapping[str, str]) -> dict[str, Stored]:
        weights = stored_weights(where)
        return {name: weights[parameter_name(old)] for name, old in wanted.items() if parameter_name(old) in weights}

    own = found(source, {name: name for name in names})
    return own if proxy is None else found(open_source(proxy), names), own


def _in_memory(source: Source, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], form: str) -> Any:
    model = source.decoder if form == "adapter" else copy.deepcopy(source.decoder)
    fused = put_on(model, rekey_config(config, tensors, source.blocks_path), tensors)
    if form == "adapter":
        return fused
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied", UserWarning)
        merged = fused.merge_and_unload()
    check_finite(merged.state_dict(), "the fused LLM, perhaps by too large a scale")
    return merged


def _write(
    directory: Path,
    source: Source,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    manifest: Manifest,
    on_progress: Callable[[float, str], None],
) -> None:
    if manifest.kind == "llm-adapter":
        tensors = on_whole(source, tensors)
        path = blocks_path(source.whole)
        config = rekey_config(config, tensors, path, spell_out=source.multimodal)
        config = without_defaults({**config, "base_model_name_or_path": hub_id(source.path)})
        write_adapter(directory, config, tensors, manifest)
        return
    start, total = 0.5 if "scale_curve" in manifest.settings else 0.0, max(1, source.files.bytes)

    def on_bytes(written: int) -> None:
        on_progress(min(1.0, start + (1 - start) * written / total), f"{written / 1e9:.2f} GB written")

    merge_adapter(source, tensors, config, directory, on_bytes=on_bytes)
    manifest.write(directory)
