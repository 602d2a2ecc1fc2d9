"""The proxy aligned anew before every round ([heal] realign_steps), as FedBiOT does; engine inline only."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fedproxy.adapter_files import read_adapter, write_adapter
from fedproxy.artifacts import new_directory
from fedproxy.compression.realign import Realigner, emulator_blocks, last_aligned
from fedproxy.config import Experiment
from fedproxy.errors import UsageError
from fedproxy.federation.start import load_proxy
from fedproxy.federation.tuning import START
from fedproxy.layer_map import split_name
from fedproxy.models.checkpoints import resolve
from fedproxy.models.lora import AdaptedModel, adapter_state, set_adapter_state, without_dropout
from fedproxy.models.parallel import team
from fedproxy.public_text import read_documents
from fedproxy.run_directory import RunDirectory

ALIGNMENT, ALIGNED = "alignment", "aligned"
"""RUN/alignment: what aligns the proxy for each round. RUN/aligned: the adapter with that, for the proxy alone."""


def open_aligner(experiment: Experiment, directory: RunDirectory, tokenizer: Any) -> tuple[AdaptedModel, Realigner]:
    """The proxy with an adapter on all blocks, RUN/start in those that clients train, and what aligns the others.

    Raises:
        UsageError: this is one of several processes.
    """
    if team() is not None:
        raise UsageError("[heal] realign_steps needs a single process: run fedproxy without a launcher.")
    proxy = directory.path / "proxy"
    _, fresh, manifest = read_adapter(directory.path / START)
    owned = sorted({split_name(name)[1] for name in fresh})
    emulator = emulator_blocks(len(manifest.layer_map), owned)

    def loaded(path: Path, blocks: Literal["all"] | list[int]) -> AdaptedModel:
        return load_proxy(replace(experiment, train=replace(experiment.train, blocks=blocks)), path)

    model = loaded(proxy, "all")
    without_dropout(model, emulator)
    set_adapter_state(model, {**adapter_state(model), **fresh})
    llm = loaded(resolve(experiment.llm.path), [manifest.layer_map[block] for block in owned])
    documents, _ = read_documents(Path(experiment.heal.text or experiment.compress.calibration))
    aligner = Realigner(
        llm,
        model,
        layer_map=manifest.layer_map,
        owned=owned,
        settings=experiment.heal,
        documents=documents,
        tokenizer=tokenizer,
        seed=experiment.seed,
        folder=directory.path / ALIGNMENT,
    )
    return model, aligner


def write_aligned(directory: RunDirectory) -> None:
    """Write RUN/aligned, RUN/adapter with what aligned the proxy, if anything did and it is not there."""
    extra = last_aligned(directory.path / ALIGNMENT)
    if not extra or (directory.path / ALIGNED).is_dir():
        return
    config, tensors, manifest = read_adapter(directory.path / "adapter")
    config["layers_to_transform"] = list(range(len(manifest.layer_map)))
    with new_directory(directory.path / ALIGNED) as folder:
        write_adapter(folder, config, dict(sorted({**tensors, **extra}.items())), manifest)


def proxy_adapter(run: Path) -> Path:
    """The adapter that belongs onto a run's proxy."""
    return run / ALIGNED if (run / ALIGNED).is_dir() else run / "adapter"
