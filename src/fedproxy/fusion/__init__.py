"""Fuse a federated adapter, trained on the proxy, into the LLM: as an adapter for it, or as a merged checkpoint."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

from fedproxy.artifacts import MANIFEST, Manifest, new_directory
from fedproxy.checkpoint_files import model_identity
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.fusion.plug_in import check_fits, merge_into, rekey_adapter, rekey_config
from fedproxy.models.checkpoints import load_model, load_skeleton, resolve, save_checkpoint
from fedproxy.models.families import blocks, blocks_path
from fedproxy.models.lora import WEIGHTS_FILE, read_adapter, write_adapter

__all__ = ["FORMS", "fuse"]

FORMS = ("adapter", "checkpoint")


def fuse(
    llm: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    form: str = "adapter",
    scale: float = 1.0,
    overwrite: bool = False,
) -> Path:
    """Put the task vector of each proxy block onto the LLM block it came from.

    Both forms hold the same model: the adapter, merged by PEFT, gives the checkpoint.

    Args:
        llm: The LLM that the proxy was made from: directory or Hub id.
        adapter: Directory of an adapter trained on the proxy.
        out: Directory to write.
        form: "adapter" (a PEFT adapter for the untouched LLM) or "checkpoint" (the LLM with merged weights).
        scale: Factor of the task vector.
        overwrite: Replace `out`.

    Returns:
        The directory written.

    Raises:
        ArtifactError: the LLM or the adapter is damaged, or the adapter is of another LLM or layer map, already fused,
            or does not fit.
        UsageError: a setting is impossible, or `out` exists or cannot be written.

    Reference:
        FedProxy, Eq. 15.
    """
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r}; there are: {', '.join(FORMS)}.")
    if not math.isfinite(scale):
        raise UsageError(f"scale must be a finite number, got {scale}.")
    config, tensors, manifest = read_adapter(Path(adapter))
    source = resolve(llm)
    adapter_sha256 = hashlib.sha256((Path(adapter) / WEIGHTS_FILE).read_bytes()).hexdigest()
    _check_llm(source, manifest, adapter_sha256)
    skeleton = load_skeleton(source)
    path = blocks_path(skeleton)
    if len(blocks(skeleton)) != manifest.llm_blocks:
        raise ArtifactError(f"{llm} has {len(blocks(skeleton))} blocks, the adapter's LLM has {manifest.llm_blocks}.")
    moved = rekey_adapter(tensors, manifest.layer_map, path, scale)
    check_fits(skeleton, moved, config)
    settings = {**manifest.settings, "scale": scale, "adapter_sha256": adapter_sha256}
    with new_directory(Path(out), overwrite=overwrite) as directory:
        if form == "adapter":
            record = replace(manifest, kind="llm-adapter", settings=settings)
            write_adapter(directory, rekey_config(config, moved, path), moved, record)
        else:
            model = load_model(source)
            merge_into(model, moved, config)
            save_checkpoint(directory, model, source)
            replace(manifest, kind="fused", settings=settings).write(directory)
    return Path(out)


def _check_llm(llm: Path, manifest: Manifest, adapter_sha256: str) -> None:
    if manifest.kind != "proxy-adapter":
        raise ArtifactError("the adapter counts LLM blocks already: it is fused. Load it on the LLM with PEFT.")
    if (llm / MANIFEST).is_file() and Manifest.read(llm).settings.get("adapter_sha256") == adapter_sha256:
        raise ArtifactError(f"{llm} holds this adapter already. Fuse it into the LLM it came from.")
    sha256 = model_identity(llm)
    if sha256 != manifest.llm_sha256:
        raise ArtifactError(
            f"the adapter belongs to another LLM (sha256 {manifest.llm_sha256[:12]}…) than {llm} ({sha256[:12]}…)."
        )
