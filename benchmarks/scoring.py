"""Scoring a real LLM's options, beside the LM evaluation harness's own model and beside float32.

    python benchmarks/scoring.py --llm DIR --data DIR [--repeats 3] [--documents 30]

DIR of --llm is a checkpoint (`scripts/fetch_small_llm.py smollm2 DIR` fetches SmolLM2), DIR of --data holds the tasks'
data sets in the Hub's schema. All score the same documents in turns, each beginning another turn; ratios are within a
turn. Writes benchmarks/results/scoring.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from training_loop import spread

from fedproxy.artifacts import write_json
from fedproxy.evaluation import harness_model
from fedproxy.evaluation.loading import load_for_evaluation
from fedproxy.models.checkpoints import load_model, load_tokenizer
from fedproxy.run_directory import environment

HERE = Path(__file__).parent
TASKS = ["sst2", "ag_news", "trec", "banking77", "clinc150"]
INCLUDE = HERE.parent / "experiments" / "lab" / "tasks"
BATCH = 64
OURS, WIDE = "ours", "ours, float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--documents", type=int, default=30, help="of each task")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scoring.json")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.llm)
    wide, own = (load_model(args.llm, dtype=dtype) for dtype in (torch.float32, None))
    ways = {
        OURS: harness_model(args.llm, batch_size=BATCH),
        WIDE: harness_model(wide, tokenizer=tokenizer, batch_size=BATCH),
        "harness, float32": HFLM(pretrained=wide, tokenizer=tokenizer, batch_size=BATCH),
        "harness, bfloat16": HFLM(pretrained=own, tokenizer=tokenizer, batch_size=BATCH),
    }
    loaded = load_for_evaluation(TASKS, data=args.data, include=INCLUDE, trust_tasks=True)

    def scored(lm: Any, limit: int) -> list[float]:
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(loaded.values()),
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
        )
        return [sample["acc"] for task in TASKS for sample in results["samples"][task]]

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[float]] = {}
    for turn in range(args.repeats + 1):
        names = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
        for name in names:
            began = time.perf_counter()
            found[name] = scored(ways[name], args.documents if turn else 2)
            if turn:
                seconds[name].append(time.perf_counter() - began)

    def relative(other: str) -> dict[str, float]:
        return spread([theirs / ours for theirs, ours in zip(seconds[other], seconds[OURS], strict=True)])

    documents = len(found[WIDE])
    result = {
        "tasks": TASKS,
        "documents": documents,
        "batch_size": BATCH,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "ways": [
            {
                "name": name,
                "documents_per_second": spread([documents / one for one in taken]),
                "others_seconds_relative_to_ours": relative(name),
                "accuracy": sum(found[name]) / documents,
                "answered_otherwise_than_ours_in_float32": sum(
                    one != other for one, other in zip(found[name], found[WIDE], strict=True)
                ),
            }
            for name, taken in seconds.items()
        ],
        "environment": environment(),
    }
    write_json(args.out, result)
    print(json.dumps({name: value for name, value in result.items() if name != "environment"}, indent=2))


if __name__ == "__main__":
    main()
