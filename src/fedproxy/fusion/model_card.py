"""The model card (README.md in the Hub's format) of a tuned LLM: no paths of its owner, no data of the clients."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fedproxy.artifacts import Manifest, new_file
from fedproxy.errors import ArtifactError

CARD = "README.md"
_NAME = "fused-llm"
_BEGIN, _END = "<!-- scores -->", "<!-- end of scores -->"
_METRICS = {"acc": "accuracy", "acc_norm": "accuracy"}
"""The harness's names of metrics that the Hub calls otherwise."""

_LOAD_ADAPTER = """from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

llm = {base}
model = PeftModel.from_pretrained({auto_class}.from_pretrained(llm), "THIS_DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained(llm)"""
_LOAD_CHECKPOINT = """from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("THIS_DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")"""

_BODY = """
# {title}

An LLM tuned by federated learning with fedproxy: the LLM stayed with its owner,
the text with the clients. A proxy, the LLM without some of its blocks, was tuned in rounds by the clients; what it
learned was added to the blocks that the proxy was cut from, without training the LLM (FedProxy,
[arXiv 2604.19015](https://arxiv.org/abs/2604.19015), Eq. 15).

**License: to be set by the owner.** Replace `license` and `license_name` above, and this line; the license of the
base model and the agreements with the clients bind the choice.

## Load

```python
{load}
```

{identity}

## Scores

{begin}
Not evaluated.
{end}

## How it was made

| | |
|---|---|
{settings}

Proxy block by proxy block, the adapter lies on these blocks of the LLM (counted from 0, of {blocks}):
{layer_map}. `fedproxy.json` beside this card holds everything that was set.

## What it may reveal

The tuned weights come from the clients' updates, merged. Unless the clients trained with differential privacy, which
this card does not state, text that they trained on can leave traces in the model: whether a known text was among it
can be guessed, and parts may be completed from a beginning. Whoever can query the model can try. What was protected
from whom during the federation, and what was not, is in fedproxy's `docs/threat_model.md`. Decide who gets this model
with that in mind.

## Limits

What it answers was scored on the tasks above at most, and not examined otherwise. It inherits the biases of the base
model, and those of texts that its owner has never seen.
"""


def write_card(directory: Path, manifest: Manifest, *, base_model: str | None, auto_class: str) -> None:
    """Write the card of a fused LLM, as an adapter or as a checkpoint; its scores are not known yet.

    Args:
        directory: The artifact.
        manifest: Its `fedproxy.json`, of kind "llm-adapter" or "fused".
        base_model: Hub id of the LLM; none if it is a directory of the owner's, which the card does not name.
        auto_class: Class of transformers that loads the LLM.
    """
    adapter = manifest.kind == "llm-adapter"
    data = ModelCardData(
        base_model=base_model,
        library_name="peft" if adapter else "transformers",
        license="other",
        license_name="to-be-set-by-the-owner",
        pipeline_tag="text-generation",
        tags=["fedproxy", "federated-learning"] + ["lora"] * adapter,
        base_model_relation=None if base_model is None else "adapter" if adapter else "finetune",
    )
    identity = f"The LLM has fedproxy's identity `{manifest.llm_sha256}` (SHA-256 over configuration and tensors)."
    if adapter and base_model is None:
        identity += " Its owner has not said where it lies: set `LLM` to its directory or Hub id."
    text = _BODY.format(
        title="Tuned LLM: an adapter" if adapter else "Tuned LLM: a checkpoint",
        load=(_LOAD_ADAPTER if adapter else _LOAD_CHECKPOINT).format(
            auto_class=auto_class, base="LLM" if base_model is None else repr(base_model)
        ),
        identity=identity,
        begin=_BEGIN,
        end=_END,
        settings="\n".join(f"| {name} | {value} |" for name, value in _settings(manifest)),
        blocks=manifest.llm_blocks,
        layer_map=", ".join(map(str, manifest.layer_map)),
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
