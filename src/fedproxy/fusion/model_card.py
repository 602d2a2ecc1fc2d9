"""The model card (README.md in the Hub's format) of a tuned LLM: no paths of its owner, no data of the clients."""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template

from fedproxy.artifacts import Manifest, new_file
from fedproxy.errors import ArtifactError

CARD = "README.md"
_NAME = "fused-llm"
_BEGIN, _END = "<!-- scores -->", "<!-- end of scores -->"
_METRICS = {"acc": "accuracy", "acc_norm": "accuracy"}
"""The harness's names of metrics that the Hub calls otherwise."""


def write_card(directory: Path, manifest: Manifest, *, base_model: str | None, auto_class: str) -> None:
    """Write the card of a fused LLM, as an adapter or as a checkpoint; its scores are not known yet.

    Args:
        directory: The artifact.
        manifest: Its `fedproxy.json`, of kind "llm-adapter" or "fused".
        base_model: Hub id of the LLM; none if it is a directory of the owner's, which the card does not name.
        auto_class: Class of transformers that loads the LLM.
    """
    adapter, federated = manifest.kind == "llm-adapter", "trained_with" not in manifest.settings
    data = ModelCardData(
        base_model=base_model,
        library_name="peft" if adapter else "transformers",
        license="other",
        license_name="to-be-set-by-the-owner",
        pipeline_tag="text-generation",
        tags=["fedproxy"] + ["federated-learning"] * federated + ["lora"] * adapter,
        base_model_relation=None if base_model is None else "adapter" if adapter else "finetune",
    )
    template = files("fedproxy.fusion").joinpath("model_card.md.j2").read_text(encoding="utf-8")
    text = Template(template, trim_blocks=True, keep_trailing_newline=True).render(
        adapter=adapter,
        federated=federated,
        auto_class=auto_class,
        base_model=base_model,
        manifest=manifest,
        settings=_settings(manifest),
        begin=_BEGIN,
        end=_END,
    )
    _write(directory / CARD, data, text)


def add_scores(directory: Path, evaluation: Mapping[str, Any]) -> None:
    """Put scores into the card of a fused LLM, replacing those of before; what else its owner changed stays.

    Args:
        directory: The artifact; nothing is done where it has no card.
        evaluation: `evaluation` of a run's results: "fused" and, to compare with, "llm".

    Raises:
        ArtifactError: the card has no valid metadata.
    """
    path = directory / CARD
    if not path.is_file() or "fused" not in evaluation:
        return
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ArtifactError(f"{path} is no model card ({error}). Correct or remove it.") from error
    data: Any = card.data
    rows, found = [], []
    before = evaluation.get("llm", {}).get("tasks", {})
    for task, metrics in evaluation["fused"]["tasks"].items():
        for metric, value in metrics.items():
            if metric == "n":
                continue
            was = before.get(task, {}).get(metric)
            rows.append((task, metric, metrics.get("n", "–"), "–" if was is None else f"{was:.4f}", f"{value:.4f}"))
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=task,
                    dataset_name=task,
                    metric_type=_METRICS.get(metric, metric),
                    metric_name=metric,
                    metric_value=round(value, 6),
                )
            )
    data.model_name, data.eval_results = _NAME, found
    lines = ["Tasks of the LM evaluation harness.", "", "| task | metric | rows | LLM before | this model |"]
    lines += ["|---|---|---|---|---|", *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)]
    section = "\n".join([_BEGIN, *lines, _END])
    _write(path, data, re.sub(f"{_BEGIN}.*{_END}", lambda _: section, card.text, flags=re.DOTALL))


def _settings(manifest: Manifest) -> list[tuple[str, str]]:
    """What shaped the training, of the manifest's settings: chosen names, so that nothing else gets in."""
    chosen = {
        "federate": ("rounds", "merge", "space", "regulariser", "server_optimizer", "wire"),
        "train": ("epochs", "batch_size", "learning_rate", "max_length", "lora_r", "lora_alpha", "lora_targets"),
    }
    found = []
    for table, names in chosen.items():
        values = manifest.settings.get(table)
        if isinstance(values, Mapping):
            found += [(f"[{table}] {name}", _cell(values[name])) for name in names if name in values]
    found += [("scale of the task vector", _cell(manifest.settings.get("scale", 1.0))), ("seed", _cell(manifest.seed))]
    return found


def _cell(value: object) -> str:
    """A value as one cell of a Markdown table, without markup of its own."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(text.split()))


def _write(path: Path, data: ModelCardData, text: str) -> None:
    with new_file(path) as file:
        file.write(f"---\n{data.to_yaml()}\n---\n{text}".encode())
