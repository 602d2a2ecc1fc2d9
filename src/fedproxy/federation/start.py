"""What a run's rounds begin with: the proxy with a fresh adapter, and that adapter in RUN/start."""

from pathlib import Path

from fedproxy.adapter_files import write_adapter
from fedproxy.artifacts import Manifest, new_directory
from fedproxy.config import Experiment
from fedproxy.federation.tuning import START
from fedproxy.models.lora import AdaptedModel, adapter_config, adapter_state
from fedproxy.models.trainable import load_trainable
from fedproxy.run_directory import RunDirectory


def adapter_manifest(source: Manifest, kind: str, layer_map: list[int], experiment: Experiment) -> Manifest:
    """The manifest of an adapter that was tuned in `experiment`.

    Args:
        source: The manifest of the proxy.
        kind: "proxy-adapter" or "llm-adapter".
        layer_map: Blocks of the LLM that the adapter's blocks belong to.
        experiment: The experiment.
    """
    record = experiment.as_dict()
    return Manifest(
        kind=kind,
        llm_sha256=source.llm_sha256,
        llm_blocks=source.llm_blocks,
        layer_map=layer_map,
        settings={
            "train": record["train"],
            "federate": record["federate"],
            "healed": bool(source.settings.get("healed")) and kind == "proxy-adapter",
        },
        seed=experiment.seed,
    )


def begin(experiment: Experiment, directory: RunDirectory, model: AdaptedModel | None = None) -> None:
    """Write RUN/start, the adapter of the first round, unless it is there.

    Args:
        experiment: The experiment.
        directory: The run, its proxy written.
        model: The proxy with its fresh adapter, if it is loaded already.
    """
    place, proxy = directory.path / START, directory.path / "proxy"
    if place.is_dir():
        return
    model = model or load_proxy(experiment, proxy)
    source = Manifest.read(proxy)
    with new_directory(place) as folder:
        manifest = adapter_manifest(source, "proxy-adapter", source.layer_map, experiment)
        write_adapter(folder, adapter_config(model), adapter_state(model), manifest)


def load_proxy(experiment: Experiment, path: Path) -> AdaptedModel:
    """Load a proxy, or the LLM itself, with a fresh adapter, ready for training."""
    return load_trainable(
        path, experiment.train, seed=experiment.seed, trust_remote_code=experiment.llm.trust_remote_code
    )
