"""Pre-train the small LLM that ships with fedproxy.

    python scripts/pretrain_demo_llm.py scripts/demo_llm.toml --data DIR --out DIR [--resume]

The mixture file names the sources, their share of the tokens and their licences; paths in it count
from `--data`. The model is a Llama whose blocks are dropped at random during training (LayerDrop,
Fan et al. 2020: no rescaling, so that every sub-network is trained as it will be used), which makes
its depth redundant the way a large LLM's is. Training state is written every few minutes; `--resume`
goes on from it. Works on CPU and on one GPU.
"""

import argparse
import gzip
import json
import math
import os
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2


def documents(source: dict, data: Path) -> Iterator[str]:
    """Yield the documents of one source: text split at a separator, or JSON Lines through a template."""
    excluded = set()
    for name in source.get("exclude", []):
        with open(data / name) as lines:
            excluded |= {json.loads(line)[source["exclude_field"]].strip() for line in lines}
    for name in source["files"]:
        path = data / name
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
            if "template" in source:
                for line in file:
                    row = json.loads(line)
                    row["label_words"] = str(row.get("label_text", "")).replace("_", " ")
                    if row.get("label_text") in source.get("skip_labels", []):
                        continue
                    if excluded and row[source["exclude_field"]].strip() in excluded:
                        continue
                    if "choices" in row:
                        if row["answerKey"] not in row["choices"]["label"]:
                            continue
                        row["answer"] = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
                    yield source["template"].format(**row).strip()
            else:
                text = file.read(source.get("max_characters", -1))
                for document in text.split(source.get("separator", "\n<|endoftext|>\n")):
                    document = document.strip()
                    if len(document) > 40 and document not in excluded:
                        yield document


def train_tokenizer(mixture: dict, data: Path, out: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on an even share of every source; it puts <s> before each text."""

    def sample() -> Iterator[str]:
        for source in mixture["source"]:
            budget = int(20_000_000 * source["share"])
            for document in documents(source, data):
                yield document[: min(budget, 20_000)]
                budget -= len(document[:20_000])
                if budget <= 0:
                    break

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        sample(),
        trainers.BpeTrainer(
            vocab_size=mixture["model"]["vocab_size"],
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=mixture["model"]["max_position_embeddings"],
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def encode_sources(mixture: dict, data: Path, tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """Encode each source into one stream `<s> document </s> <s> ...` of token ids (uint16)."""
    streams = []
    for source in mixture["source"]:
        ids: list[int] = []
        batch: list[str] = []
        for document in documents(source, data):
            batch += [document[i : i + 50_000] for i in range(0, len(document), 50_000)]
            if len(batch) >= 512:
                for encoding in tokenizer.backend_tokenizer.encode_batch(batch):
                    ids += [*encoding.ids, EOS]
                batch = []
        for encoding in tokenizer.backend_tokenizer.encode_batch(batch):
            ids += [*encoding.ids, EOS]
        streams.append(np.array(ids, dtype=np.uint16))
        print(f"{source['name']:24} {len(ids):>10,} tokens", file=sys.stderr, flush=True)
    return streams


def sample_batch(
    streams: list[np.ndarray], shares: np.ndarray, size: int, window: int, generator: np.random.Generator
) -> torch.Tensor:
    """Draw `size` windows of `window + 1` tokens, the source of each by its share."""
    rows = []
    for source in generator.choice(len(streams), size=size, p=shares):
        stream = streams[source]
        start = generator.integers(0, len(stream) - window - 1)
        rows.append(stream[start : start + window + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def loss_of(model: LlamaForCausalLM, blocks: list, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token, running only the blocks given."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    hidden = model.model.embed_tokens(inputs)
    positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    mask = torch.full((inputs.shape[1],) * 2, -math.inf, device=inputs.device).triu(1)[None, None]
    for block in blocks:
        hidden = block(hidden, position_embeddings=rotary, attention_mask=mask)
    return head_loss(model.model.norm, model.lm_head, hidden, targets)


def head_loss(norm, head, hidden, targets):
    logits = head(norm(hidden))
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def optimizer_state(optimizers: list) -> dict[str, torch.Tensor]:
    """Flatten the optimizers' states into named tensors."""
    return {
        f"{number}.{index}.{key}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for number, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore_optimizers(optimizers: list, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `optimizer_state` flattened."""
    for number, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        for name, value in tensors.items():
            owner, index, key = name.split(".", 2)
            if int(owner) == number:
                whole["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(whole)


def save_state(out: Path, model: LlamaForCausalLM, optimizers: list, progress: dict) -> None:
    """Write weights, optimizer state and progress so that a kill leaves the old or the new state."""
    state = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    state |= {f"optimizer.{k}": v.contiguous() for k, v in optimizer_state(optimizers).items()}
    save_file(state, out / "state.tmp", metadata={"progress": json.dumps(progress)})
    os.replace(out / "state.tmp", out / "state.safetensors")


def card(mixture: dict, progress: dict, parameters: int) -> str:
    """The model card."""
    total = progress["tokens"]
    rows = "\n".join(
        f"| {s['name']} | {s['share']:.0%} | {s['share'] * total / 1e6:.1f}M | {s['licence']} | {s['origin']} |"
        for s in mixture["source"]
    )
    shape = mixture["model"]
    return f"""---
license: {mixture["licence"]}
language: en
pipeline_tag: text-generation
library_name: transformers
---

# fedproxy demo LLM

A Llama of {parameters / 1e6:.1f}M parameters ({shape["num_hidden_layers"]} blocks of width {shape["hidden_size"]}, vocabulary {shape["vocab_size"]:,},
tied embedding, bf16), pre-trained so that `fedproxy demo` has a real model to compress, tune and put back together without a network.
It is a laboratory animal, not an assistant.

Trained by `scripts/pretrain_demo_llm.py` on {total / 1e6:.1f}M tokens in windows of {mixture["train"]["window"]} tokens ({progress["seconds"] / 60:.0f} minutes on
{progress["device"]}); LayerDrop rising linearly to {mixture["train"]["layer_drop"]} over the depth; Muon for matrices, AdamW for the rest. Mean training loss over
the last 100 steps: {progress["loss"]:.2f} nats a token.

| source | share | tokens | licence | origin |
| --- | --- | --- | --- | --- |
{rows}

{mixture["notes"].strip()}
"""


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder that the mixture's paths count from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the schedule after this time, too")
    parser.add_argument("--tokens", type=float, help="tokens to train on (default: the mixture file's)")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    mixture = tomllib.loads(args.mixture.read_text())
    train, goal = mixture["train"], args.tokens or mixture["train"]["tokens"]
    args.out.mkdir(parents=True, exist_ok=True)

    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        tokenizer = train_tokenizer(mixture, args.data, args.out)
    streams = encode_sources(mixture, args.data, tokenizer)
    shares = np.array([source["share"] for source in mixture["source"]])
    shares /= shares.sum()

    torch.manual_seed(train["seed"])
    config = LlamaConfig(
        **mixture["model"], tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS
    )
    # The backward pass of PyTorch's fused attention takes 59 % of a step on CPU; plain attention, compiled, halves the step.
    config._attn_implementation = "eager" if args.device == "cpu" else "sdpa"
    model = LlamaForCausalLM(config).to(args.device).train()
    blocks = list(model.model.layers)
    for block in blocks:
        block.compile()
    global head_loss
    head_loss = torch.compile(head_loss)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=train["learning_rate"], weight_decay=train["weight_decay"], adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=train["learning_rate"], betas=(0.9, 0.95), weight_decay=0.0),
    ]
    progress = {"step": 0, "tokens": 0, "seconds": 0.0, "loss": math.nan, "device": args.device}
    if args.device == "cpu":
        progress["device"] = f"{torch.get_num_threads()} CPU cores"
    if args.resume:
        state = load_file(args.out / "state.safetensors", device=args.device)
        model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")}, strict=False)
        restore_optimizers(optimizers, {k[10:]: v for k, v in state.items() if k.startswith("optimizer.")})
        with safe_open(args.out / "state.safetensors", "pt") as file:
            progress = json.loads(file.metadata()["progress"])

    drop = [train["layer_drop"] * i / (len(blocks) - 1) for i in range(len(blocks))]
    tokens_per_step = train["batch"] * train["window"]
    losses: list[float] = []
    last_save = started = time.monotonic()
    earlier = progress["seconds"]
    while True:
        progress["seconds"] = earlier + time.monotonic() - started
        done = max(progress["tokens"] / goal, progress["seconds"] / 60 / args.minutes)
        if done >= 1:
            break
        warm = min(1.0, (progress["step"] + 1) / train["warmup_steps"])
        decay = min(1.0, (1 - done) / train["decay"])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = train["learning_rate"] * warm * max(decay, 0.02)
        generator = np.random.default_rng([train["seed"], progress["step"]])
        micro = train["micro_batch"]
        total = 0.0
        for _ in range(train["batch"] // micro):
            tokens = sample_batch(streams, shares, micro, train["window"], generator).to(args.device)
            kept = [b for b, p in zip(blocks, drop, strict=True) if generator.random() >= p]
            with torch.autocast(args.device, torch.bfloat16):
                loss = loss_of(model, kept, tokens) * micro / train["batch"]
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses = [*losses[-99:], total]
        progress |= {
            "step": progress["step"] + 1,
            "tokens": progress["tokens"] + tokens_per_step,
            "loss": sum(losses) / len(losses),
        }
        if progress["step"] % 50 == 0:
            rate = (progress["step"] * tokens_per_step) / max(progress["seconds"], 1)
            print(
                f"step {progress['step']} tokens {progress['tokens']:,} loss {total:.3f} mean {progress['loss']:.3f}"
                f" lr {warm * decay:.2f} {rate:,.0f} tok/s {progress['seconds'] / 60:.1f} min",
                file=sys.stderr,
                flush=True,
            )
        if time.monotonic() - last_save > train["save_every_seconds"]:
            save_state(args.out, model, optimizers, progress)
            last_save = time.monotonic()

    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    parameters = sum(p.numel() for p in model.parameters())
    (args.out / "README.md").write_text(card(mixture, progress, parameters))
    (args.out / "state.safetensors").unlink(missing_ok=True)
    print(json.dumps(progress))


if __name__ == "__main__":
    main()
