"""Local training on a mixture of lengths: throughput beside a bare loop, transformers' Trainer and TRL; loss curves.

    python benchmarks/training_loop.py --data DIR [--llm DIR] [--repeats 5] [--rows 80]

DIR holds a folder for each data set (NAME/train.jsonl, in the Hub's schema). The contestants take turns, each beginning
another turn, so that a noisy machine disturbs them alike; ratios are within a turn. The bare loop is what one writes by
hand for this model, and gets our batches, our packing and our attention: what is missing to it is our overhead. Trainer
has its defaults (shuffled batches, padded to their longest) and bf16 autocast as ours; SFTTrainer joins where it is
installed. Tokens are real ones, padding not counted. The curves are of the same rows in three orders: ours packed,
ours padded (the same batches), and Trainer's; there ours does not group by length either, so that a step means the same.
Writes benchmarks/results/training_loop.json.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments

from fedproxy.artifacts import write_json
from fedproxy.config import Train
from fedproxy.models.checkpoints import load_model, load_tokenizer
from fedproxy.models.encoding import Encoded, encode
from fedproxy.models.gradients import bf16_is_fast, suit_attention
from fedproxy.models.label_loss import summed_loss
from fedproxy.models.layouts import IGNORED, collate, pack
from fedproxy.models.lora import attach
from fedproxy.models.training import optimizer_steps, step_batches, train
from fedproxy.run_directory import environment

HERE = Path(__file__).parent
DEMO_LLM = HERE.parent / "src" / "fedproxy" / "demo" / "llm"
SETTINGS = Train(epochs=1, batch_size=16, learning_rate=2e-3, lora_r=16, lora_alpha=32, lora_dropout=0.0)
CPU = torch.device("cpu")
AUTOCAST = bf16_is_fast(CPU)
SEEDS = (0, 1, 2)
SMOOTHED_OVER = 8
BINS = (16, 32, 64, 128, 256, 512)
LIMITS = {"bare": 0.95, "trainer": 1.3}

Row = dict[str, str]
FORMATS: dict[str, Callable[[Any], tuple[str, str]]] = {
    "sst2": lambda row: (f"{row['sentence']}\nSentiment:", ("negative", "positive")[row["label"]]),
    "mnli": lambda row: (f"{row['premise']}\n{row['hypothesis']}\nRelation:", ("yes", "maybe", "no")[row["label"]]),
    "ag_news": lambda row: (f"{row['text']}\nTopic:", ("world", "sports", "business", "science")[row["label"]]),
    "openbookqa": lambda row: (
        f"{row['question_stem']}:",
        row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])],
    ),
    "dolly_3k": lambda row: (f"{row['instruction']}\n{row['input']}\nAnswer:", row["output"]),
    "alpaca": lambda row: (f"{row['instruction']}\n{row['input']}\nAnswer:", row["output"]),
}
"""Prompt and completion of a row: short labels, sentences, and long answers."""


def read(data: Path, begin: int, count: int) -> list[Row]:
    """Some rows of every data set, mixed."""
    rows = []
    for name, form in FORMATS.items():
        with open(data / name / "train.jsonl") as file:
            for line in itertools.islice(file, begin, begin + count):
                prompt, completion = form(json.loads(line))
                rows.append({"prompt": prompt, "completion": f" {completion}"})
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[i] for i in order]


def adapted(llm: Path) -> Any:
    return attach(load_model(llm, dtype=torch.float32), r=16, alpha=32, dropout=0.0, seed=0)


def bare(model: Any, examples: Sequence[Encoded], pad: int, seed: int) -> list[float]:
    """The loop one writes by hand for a Llama: no bookkeeping, no checks."""
    base = model.get_base_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=SETTINGS.learning_rate, weight_decay=0.0, fused=True)
    model.train()
    losses = []
    for [batch] in itertools.islice(step_batches(examples, SETTINGS, seed), optimizer_steps(len(examples), SETTINGS)):
        rows = pack(batch, pad)
        labels = F.pad(rows["labels"][:, 1:], (0, 1), value=IGNORED)
        suit_attention(base, "sdpa", labels.shape[1], CPU)
        with torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
            hidden = base.model(rows["input_ids"], position_ids=rows["position_ids"], use_cache=False)[0]
            logits = base.lm_head(hidden[labels != IGNORED])
        loss = F.cross_entropy(logits.float(), labels[labels != IGNORED])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fedproxy(model: Any, examples: Sequence[Encoded], pad: int, seed: int, **changes: Any) -> list[float]:
    return train(model, examples, replace(SETTINGS, **changes), pad=pad, seed=seed).losses


def arguments(folder: str, seed: int, **more: Any) -> dict[str, Any]:
    """What Trainer and SFTTrainer are given alike."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": SETTINGS.batch_size,
        "num_train_epochs": 1,
        "learning_rate": SETTINGS.learning_rate,
        "lr_scheduler_type": "constant",
        "seed": seed,
        "bf16": AUTOCAST,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **more,
    }


def trainer(model: Any, examples: Sequence[Encoded], pad: int, seed: int) -> list[float]:
    """Transformers' own loop, with labels only where the completion is."""
    with tempfile.TemporaryDirectory() as folder:
        made = Trainer(
            model=model,
            args=TrainingArguments(**arguments(folder, seed, remove_unused_columns=False)),
            train_dataset=list(examples),  # type: ignore[arg-type]
            data_collator=lambda batch: collate(batch, pad),
        )
        made.remove_callback(PrinterCallback)
        made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def trl(model: Any, rows: Sequence[Row], tokenizer: Any, seed: int) -> list[float]:
    """SFTTrainer with what it offers for the same job."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            **arguments(folder, seed, max_length=SETTINGS.max_length, completion_only_loss=True),
            gradient_checkpointing=False,
        )
        made = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(list(rows)), processing_class=tokenizer
        )
        made.remove_callback(PrinterCallback)
        made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@torch.no_grad()
def mean_loss(model: Any, examples: Sequence[Encoded], pad: int) -> float:
    """Loss on rows that were not trained on, nats per token that counts."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
        parts = [float(summed_loss(model, collate([example], pad))) for example in examples]
    return sum(parts) / sum(example.counting for example in examples)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means of so many losses in a row, or of all if there are fewer."""
    over = min(SMOOTHED_OVER, len(losses))
    return [statistics.fmean(losses[i : i + over]) for i in range(len(losses) - over + 1)]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def throughput(contestants: dict[str, Callable[[Any], object]], llm: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of every contestant in every turn but the first, which warms up."""
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            model = adapted(llm)
            started = time.perf_counter()
            contestants[name](model)
            taken = time.perf_counter() - started
            if turn:
                seconds[name].append(taken)
    return seconds


def curves(llm: Path, examples: Sequence[Encoded], held_out: Sequence[Encoded], pad: int) -> dict[str, Any]:
    """Loss curves over three orders of the same rows, and how far they are apart."""
    loops: dict[str, Callable[..., list[float]]] = {
        "fedproxy": partial(fedproxy, group_by_length=False),
        "fedproxy_padded": partial(fedproxy, group_by_length=False, padding_free=False),
        "trainer": trainer,
    }
    found: dict[str, list[list[float]]] = {name: [] for name in loops}
    held: dict[str, list[float]] = {name: [] for name in loops}
    for seed in SEEDS:
        for name, loop in loops.items():
            model = adapted(llm)
            found[name].append(loop(model, examples, pad, seed))
            held[name].append(mean_loss(model, held_out, pad))
    means = {name: _columns(map(smoothed, losses), statistics.fmean) for name, losses in found.items()}
    return {
        "seeds": list(SEEDS),
        "steps": len(found["fedproxy"][0]),
        "smoothed_over": SMOOTHED_OVER,
        "losses": found,
        "held_out_rows": len(held_out),
        "held_out_loss": held,
        "packed_against_padded": max(
            abs(a - b)
            for left, right in zip(found["fedproxy"], found["fedproxy_padded"], strict=True)
            for a, b in zip(left, right, strict=True)
        ),
        "difference": {
            "curves": statistics.fmean(abs(a - b) for a, b in zip(means["fedproxy"], means["trainer"], strict=True)),
            "held_out": statistics.fmean(held["fedproxy"]) - statistics.fmean(held["trainer"]),
        },
        "spread_between_seeds": {
            name: {
                "curves": statistics.fmean(_columns(map(smoothed, losses), statistics.stdev)),
                "held_out": statistics.stdev(held[name]),
            }
            for name, losses in found.items()
        },
    }


def _columns(curves: Iterator[list[float]], figure: Callable[[Sequence[float]], float]) -> list[float]:
    return [figure(values) for values in zip(*curves, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--llm", type=Path, default=DEMO_LLM)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=80, help="of each data set")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "training_loop.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    tokenizer = load_tokenizer(args.llm)
    pad = tokenizer.pad_token_id
    rows = read(args.data, 0, args.rows)
    examples = encode(rows, tokenizer, max_length=SETTINGS.max_length)
    held_out = encode(read(args.data, args.rows, args.rows // 4), tokenizer, max_length=SETTINGS.max_length)
    lengths = [len(example.ids) for example in examples]
    contestants: dict[str, Callable[[Any], object]] = {
        loop.__name__: partial(loop, examples=examples, pad=pad, seed=0) for loop in (bare, fedproxy, trainer)
    }
    if importlib.util.find_spec("trl"):
        contestants["trl"] = partial(trl, rows=rows, tokenizer=tokenizer, seed=0)
    seconds = throughput(contestants, args.llm, args.repeats)
    ratios = {
        name: spread([other / ours for other, ours in zip(values, seconds["fedproxy"], strict=True)])
        for name, values in seconds.items()
        if name != "fedproxy"
    }
    result = {
        "data": list(FORMATS),
        "rows": len(examples),
        "tokens": sum(lengths),
        "counting_tokens": sum(example.counting for example in examples),
        "lengths": {
            "up_to": list(BINS),
            "rows": [sum(low < n <= high for n in lengths) for low, high in itertools.pairwise((0, *BINS))],
            "median": statistics.median(lengths),
            "longest": max(lengths),
        },
        "settings": {"batch_size": SETTINGS.batch_size, "max_length": SETTINGS.max_length, "lora_r": SETTINGS.lora_r},
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "tokens_per_second": {
            name: spread([sum(lengths) / value for value in values]) for name, values in seconds.items()
        },
        "fedproxy_relative_to": ratios,
        "limits": {
            name: {"limit": limit, "within_limit": ratios[name]["median"] >= limit} for name, limit in LIMITS.items()
        },
        "seconds": seconds,
        "curves": curves(args.llm, examples, held_out, pad),
        "environment": environment(),
    }
    write_json(args.out, result)
    shown = {name: result[name] for name in ("tokens_per_second", "fedproxy_relative_to", "limits")}
    left_out = ("losses", "held_out_loss")
    shown["curves"] = {name: value for name, value in result["curves"].items() if name not in left_out}
    print(json.dumps(shown, indent=2))


if __name__ == "__main__":
    main()
