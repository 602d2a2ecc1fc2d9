"""What the fuse could do otherwise: other scales of the task vector, and spreading it to the blocks that were removed.

    python benchmarks/fusing.py COMPARISON

COMPARISON is a directory of `fedproxy compare experiments/lab/variants.toml --out COMPARISON`, of whose trained adapters the
`fedproxy` ones are plugged in again, scored on the same tasks and held against scale 1, paired over the documents.
Spreading: a removed block is given to the nearest kept one (ties: the one before). "copied" puts a share of that block's
task vector on it as well; "shared out" divides a kept block's task vector among itself and the removed ones that it was given.
Writes benchmarks/results/fusing.json.
"""

import argparse
import dataclasses
import json
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedproxy.artifacts import Manifest, read_json, write_json
from fedproxy.comparison.statistics import paired_difference
from fedproxy.config import load_experiment
from fedproxy.evaluation import evaluate
from fedproxy.evaluation.experiment import scored_tasks
from fedproxy.fusion import fuse
from fedproxy.run_directory import environment
from fedproxy.seeds import derive_seed
from fedproxy.tensor_files import load_tensors, save_tensors

HERE = Path(__file__).parent
BLOCK = re.compile(r"(\.layers\.)(\d+)(\.)")
SCALES: dict[str, float | str] = {
    "scale 1": 1.0,
    "scale 0.5": 0.5,
    "scale 0.75": 0.75,
    "scale 1.25": 1.25,
    "scale 1.5": 1.5,
    "scale by the public text": "auto",
}
Share = Callable[[bool, int], float]
"""(whether the block was removed, how many blocks its group has) → factor of the group's task vector on it."""
SPREADS: dict[str, Share] = {
    "copied, a quarter": lambda removed, group: 0.25 if removed else 1.0,
    "copied, whole": lambda removed, group: 1.0,
    "shared out": lambda removed, group: 1.0 / group,
}


def nearest(kept: list[int], blocks: int) -> dict[int, int]:
    """LLM block → the kept block that it belongs to."""
    return {block: min(kept, key=lambda one: (abs(one - block), one)) for block in range(blocks)}


def spread(adapter: Path, share: Share, blocks: int) -> None:
    """Rewrite an adapter on the LLM so that removed blocks have a part of the task vector of a kept one."""
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, settings = load_tensors(file), json.loads(config.read_text())
    owner = nearest(settings["layers_to_transform"], blocks)
    sizes = Counter(owner.values())
    found = {}
    for name, tensor in tensors.items():
        match = BLOCK.search(name)
        assert match is not None
        for block in (block for block, kept in owner.items() if kept == int(match[2])):
            factor = share(block != int(match[2]), sizes[int(match[2])]) if ".lora_B." in name else 1.0
            found[BLOCK.sub(rf"\g<1>{block}\g<3>", name)] = tensor * factor
    save_tensors(file, found)
    config.write_text(json.dumps(settings | {"layers_to_transform": list(range(blocks))}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fusing.json")
    args = parser.parse_args()
    experiment = load_experiment(args.comparison / "experiment.toml")
    cells = [read_json(path) for path in sorted(args.comparison.glob("cells/fedproxy/*/cell.json"))]
    documents: dict[str, list[dict[str, torch.Tensor]]] = {}
    found: list[dict[str, Any]] = []
    for cell in cells:
        run = args.comparison / "work" / "trainings" / cell["trainings"][0]
        blocks = Manifest.read(run / "proxy").llm_blocks
        for name in (*SCALES, *SPREADS):
            scores: dict[str, torch.Tensor] = {}
            with tempfile.TemporaryDirectory() as folder:
                adapter, scale = Path(folder) / "adapter", SCALES.get(name, 1.0)
                public = experiment.compress.calibration if scale == "auto" else None
                fuse(experiment.llm.path, run / "adapter", adapter, scale=scale, public=public, proxy=run / "proxy")
                chosen = Manifest.read(adapter).settings["scale"]
                if name in SPREADS:
                    spread(adapter, SPREADS[name], blocks)
                llm = AutoModelForCausalLM.from_pretrained(experiment.llm.path, dtype=torch.float32)
                result = evaluate(
                    PeftModel.from_pretrained(llm, adapter),
                    tokenizer=AutoTokenizer.from_pretrained(experiment.llm.path),
                    tasks=scored_tasks(experiment),
                    data=experiment.evaluate.data,
                    include=experiment.evaluate.include,
                    trust_tasks=experiment.evaluate.trust_tasks,
                    limit=experiment.evaluate.limit,
                    batch_size=experiment.evaluate.batch_size,
                    on_documents=lambda task, values, scores=scores: scores.update({task: torch.tensor(values)}),
                )
            documents.setdefault(name, []).append(scores)
            found.append({"variant": name, "seed": cell["seed"], "accuracy": result["average"], "scale": chosen})
            print(json.dumps(found[-1]), flush=True)
    write_json(args.out, {"cells": found, "summary": summary(found, documents), "environment": environment()})


def summary(cells: list[dict[str, Any]], documents: dict[str, list[dict[str, torch.Tensor]]]) -> list[dict[str, Any]]:
    """Mean and range over the seeds, and the difference to scale 1."""
    rows = []
    for name, mine in documents.items():
        values = [cell["accuracy"] for cell in cells if cell["variant"] == name]
        row: dict[str, Any] = {
            "variant": name,
            "mean": statistics.fmean(values),
            "min": min(values),
            "max": max(values),
        }
        if name != "scale 1":
            one, other = (
                {task: [scores[task].tolist() for scores in runs] for task in mine[0]}
                for runs in (mine, documents["scale 1"])
            )
            difference = paired_difference(one, other, seed=derive_seed(0, "bootstrap", name))
            row["difference"] = dataclasses.asdict(difference)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
