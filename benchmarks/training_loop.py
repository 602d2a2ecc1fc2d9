"""Throughput of local training: a bare loop, fedproxy's loop and TRL's SFTTrainer on the same rows, in one run.

    python benchmarks/training_loop.py [--llm DIR] [--repeats 5]

The three take turns, so that a noisy machine disturbs them alike; the ratio to the bare loop of the same turn counts.
The bare loop and ours see the same batches and the same attention; SFTTrainer, which makes its own batches of the same
rows, gets bf16 and grouping by length too. Writes benchmarks/results/training_loop.json.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch

from fedproxy.artifacts import write_json
from fedproxy.config import Train
from fedproxy.models.checkpoints import load_model, load_tokenizer
from fedproxy.models.lora import attach
from fedproxy.models.training import Encoded, batches, bf16_is_fast, collate, encode, train
from fedproxy.pipeline import environment
from fedproxy.seeds import derive_seed

HERE = Path(__file__).parent
DEMO = HERE.parent / "src" / "fedproxy" / "demo"
SETTINGS = Train(epochs=1, batch_size=16, learning_rate=2e-3, lora_r=16, lora_alpha=32, lora_dropout=0.0)


def rows() -> list[dict[str, str]]:
    """All training rows of the demo's tasks: short and long ones mixed."""
    found = []
    for path in sorted((DEMO / "tasks").glob("*/train.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found.append({"prompt": f"Text: {row['text']}\nLabel:", "completion": f" {row['label_text']}"})
    return found


def adapted(llm: Path):
    return attach(load_model(llm, dtype=torch.float32), r=16, alpha=32, dropout=0.0, seed=0)


def bare(model, examples: list[Encoded], pad: int) -> float:
    """The loop one writes by hand: no bookkeeping, no checks."""
    base = model.get_base_model()
    base.set_attn_implementation("eager")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=SETTINGS.learning_rate, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(derive_seed(0, "batches"))
    order = batches(examples, SETTINGS.batch_size, group_by_length=True, generator=generator)[::-1]
    autocast = bf16_is_fast(torch.device("cpu"))
    model.train()
    started = time.perf_counter()
    for indices in order:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**collate([examples[i] for i in indices], pad)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def trl(model, tokenizer, data: list[dict[str, str]], folder: str) -> float:
    """SFTTrainer with what it offers for the same job, and the same attention."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model.get_base_model().set_attn_implementation("eager")
    config = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=SETTINGS.batch_size,
        num_train_epochs=1,
        learning_rate=SETTINGS.learning_rate,
        lr_scheduler_type="constant",
        max_length=SETTINGS.max_length,
        completion_only_loss=True,
        train_sampling_strategy="group_by_length",
        bf16=bf16_is_fast(torch.device("cpu")),
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", type=Path, default=DEMO / "llm")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "training_loop.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    tokenizer = load_tokenizer(args.llm)
    data = rows()
    data = [data[i] for i in torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: args.rows]]
    examples = encode(data, tokenizer, max_length=SETTINGS.max_length)
    pad = tokenizer.pad_token_id
    tokens = sum(len(e.ids) for e in examples)
    seconds: dict[str, list[float]] = {"bare": [], "fedproxy": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.repeats + 1):
            taken = {
                "bare": bare(adapted(args.llm), examples, pad),
                "fedproxy": train(adapted(args.llm), examples, SETTINGS, pad=pad, seed=0).seconds,
                "trl": trl(adapted(args.llm), tokenizer, data, folder),
            }
            if turn:  # the first turn warms up
                for name, value in taken.items():
                    seconds[name].append(value)
    ratios = {
        name: [b / s for b, s in zip(seconds["bare"], seconds[name], strict=True)] for name in ("fedproxy", "trl")
    }
    result = {
        "rows": len(examples),
        "tokens": tokens,
        "tokens_per_second": {name: tokens / statistics.median(values) for name, values in seconds.items()},
        "throughput_relative_to_bare": {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in ratios.items()
        },
        "seconds": seconds,
        "environment": environment(),
    }
    write_json(args.out, result)
    print(json.dumps({k: result[k] for k in ("tokens_per_second", "throughput_relative_to_bare")}, indent=2))


if __name__ == "__main__":
    main()
