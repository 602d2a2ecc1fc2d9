"""Training with our LoRA layers beside PEFT's own, with and without dropout, on half of the blocks of a real LLM.

    python benchmarks/lora_layers.py --llm DIR --data DIR [--repeats 5] [--rows 40]

DIR of --llm is a checkpoint (`scripts/fetch_small_llm.py smollm2 DIR` fetches SmolLM2), DIR of --data as of
`training_loop.py`. All four train the same rows in the same batches, in turns, each beginning another turn; ratios are
within a turn. Curves are of orders of the rows of their own. Writes benchmarks/results/lora_layers.json.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from training_loop import read, spread

import fedproxy
from fedproxy.artifacts import write_json
from fedproxy.config import Train
from fedproxy.models import gradients, lora_layer
from fedproxy.models.checkpoints import load_tokenizer, padding
from fedproxy.models.encoding import encode
from fedproxy.models.lora import adapter_state, set_adapter_state
from fedproxy.models.trainable import load_alone
from fedproxy.models.training import Training, train
from fedproxy.run_directory import environment

HERE = Path(__file__).parent
SETTINGS = Train(epochs=1, batch_size=16, learning_rate=1e-3, max_length=96, lora_r=16, lora_alpha=32)
DROPOUT = 0.1
SEEDS = (0, 1, 2)
AIMS = {0.0: 1.5, DROPOUT: 3.0}
"""How much faster than PEFT's ours should be, by dropout."""
OURS = lora_layer.in_few_passes


@contextlib.contextmanager
def nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


LAYERS = {"ours": OURS, "PEFT's": nothing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=40, help="of each data set")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "lora_layers.json")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.llm)
    examples = encode(read(args.data, 0, args.rows), tokenizer, max_length=SETTINGS.max_length)
    with tempfile.TemporaryDirectory() as folder:
        proxy = Path(folder) / "proxy"
        fedproxy.compress(args.llm, proxy, remove=0.5, score="uniform")
        models = {
            dropout: load_alone(proxy, replace(SETTINGS, lora_dropout=dropout), seed=0) for dropout in (0.0, DROPOUT)
        }
        start = {dropout: adapter_state(model) for dropout, model in models.items()}

        def run(dropout: float, layers: str, seed: int) -> Training:
            set_adapter_state(models[dropout], start[dropout])
            setattr(gradients, "in_few_passes", LAYERS[layers])  # noqa: B010
            return train(models[dropout], examples, SETTINGS, pad=padding(tokenizer), seed=seed)

        pairs = [(dropout, layers) for dropout in models for layers in LAYERS]
        speeds: dict[tuple[float, str], list[float]] = {pair: [] for pair in pairs}
        curves: dict[tuple[float, str], list[list[float]]] = {pair: [] for pair in pairs}
        for turn in range(args.repeats + 1):
            first = turn % len(pairs)
            for pair in pairs[first:] + pairs[:first]:
                done = run(*pair, seed=turn)
                if turn:
                    speeds[pair].append(done.tokens / done.seconds)
                if turn < len(SEEDS):
                    curves[pair].append(done.losses)

    def ratio(one: tuple[float, str], other: tuple[float, str]) -> dict[str, float]:
        return spread([a / b for a, b in zip(speeds[one], speeds[other], strict=True)])

    def apart(dropout: float) -> dict[str, float]:
        ours, theirs = (
            [statistics.fmean(steps) for steps in zip(*curves[dropout, layers], strict=True)] for layers in LAYERS
        )
        between = [statistics.stdev(steps) for steps in zip(*curves[dropout, "PEFT's"], strict=True)]
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        return {"mean": statistics.fmean(differences), "most": max(map(abs, differences)), "seeds": min(between)}

    result = {
        "rows": len(examples),
        "tokens": sum(len(example.ids) for example in examples),
        "settings": {"batch_size": SETTINGS.batch_size, "max_length": SETTINGS.max_length, "lora_r": SETTINGS.lora_r},
        "dropout": DROPOUT,
        "seeds": list(SEEDS),
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "speeds": [
            {"dropout": dropout, "layers": layers, **spread(speeds[dropout, layers])} for dropout, layers in pairs
        ],
        "ours_relative_to_pefts": {str(dropout): ratio((dropout, "ours"), (dropout, "PEFT's")) for dropout in models},
        "aims": {str(dropout): aim for dropout, aim in AIMS.items()},
        "with_dropout_relative_to_without": {layers: ratio((DROPOUT, layers), (0.0, layers)) for layers in LAYERS},
        "loss_ours_less_pefts": {str(dropout): apart(dropout) for dropout in models},
        "environment": environment(),
    }
    write_json(args.out, result)
    print(json.dumps({name: value for name, value in result.items() if name != "environment"}, indent=2))


if __name__ == "__main__":
    main()
