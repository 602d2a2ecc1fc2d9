"""Write a checkpoint of exactly the shape of a well-known LLM, with random weights.

    python scripts/make_synthetic_llm.py OUT --like llama-2-7b [--dtype bf16] [--shard-size 5GB] [--seed 0] [--blocks N]

For tests and benchmarks of what must work at full size without anybody's weights. Names and shapes come from the model
that transformers builds of the published configuration on the meta device. Norms are 1; everything else is normal
with the configuration's initializer range: a pool of ten million values is drawn once, and each tensor is put together
from stretches of the pool whose places follow from the seed and the tensor's name. So 13.5 GB cost the time of the disk
and the memory of the pool, and the same seed gives the same tensors whatever the shards.

OUT gets config.json (as published, with the data type and number of blocks asked for), model-0000i-of-0000n.safetensors
with their index (or one model.safetensors), a byte-level tokenizer of 259 tokens, which fits every vocabulary, and its
generation_config.json. It appears only when complete.
"""

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fedproxy.artifacts import new_directory, write_json
from fedproxy.checkpoint_files import require_space
from fedproxy.errors import FedproxyError, UsageError
from fedproxy.seeds import derive_seed
from fedproxy.tensor_files import write_tensors

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POOL, STRETCH = 10_000_000, 1_000_000
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

Shapes = dict[str, tuple[int, ...]]


def _shape(hidden: int, intermediate: int, blocks: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


_COMMON = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True}
_LLAMA = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_LLAMA_2 = {**_LLAMA, "max_position_embeddings": 4096}
_LLAMA_3 = {
    **_LLAMA,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
_MISTRAL = {
    **_COMMON,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
_QWEN = {
    **_COMMON,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_mrope": False,
    "use_sliding_window": False,
}
_QWEN_SMALL = {**_QWEN, "max_position_embeddings": 32768, "sliding_window": 32768, "tie_word_embeddings": True}
_QWEN_LARGE = {**_QWEN, "max_position_embeddings": 131072, "sliding_window": 131072, "tie_word_embeddings": False}

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {**_LLAMA_2, **_shape(64, 176, 8, 4, 2, 300)},  # nobody's model: to try things out in a second
    "tinyllama-1.1b": {**_LLAMA, **_shape(2048, 5632, 22, 32, 4, 32000), "max_position_embeddings": 2048},
    "llama-2-7b": {**_LLAMA_2, **_shape(4096, 11008, 32, 32, 32, 32000)},
    "llama-2-13b": {**_LLAMA_2, **_shape(5120, 13824, 40, 40, 40, 32000)},
    "llama-2-70b": {**_LLAMA_2, **_shape(8192, 28672, 80, 64, 8, 32000)},
    "llama-3-8b": {**_LLAMA_3, **_shape(4096, 14336, 32, 32, 8, 128256)},
    "llama-3-70b": {**_LLAMA_3, **_shape(8192, 28672, 80, 64, 8, 128256)},
    "mistral-7b": {**_MISTRAL, **_shape(4096, 14336, 32, 32, 8, 32000)},
    "qwen2.5-0.5b": {**_QWEN_SMALL, **_shape(896, 4864, 24, 14, 2, 151936), "max_window_layers": 24},
    "qwen2.5-7b": {**_QWEN_LARGE, **_shape(3584, 18944, 28, 28, 4, 152064), "max_window_layers": 28},
}


def skeleton(config: Mapping[str, Any]) -> Any:
    """The model of a published configuration, without weights."""
    settings = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))


def tensor_shapes(model: Any) -> Shapes:
    """Names and shapes of the tensors that a checkpoint of `model` holds, in the model's order; tied ones once."""
    tied = model.all_tied_weights_keys
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def norm_weights(model: Any) -> set[str]:
    """Names of the weights of norms."""
    return {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__.endswith("Norm")}


def split(shapes: Shapes, itemsize: int, limit: int) -> list[Shapes]:
    """Cut tensors into shards of at most `limit` bytes, in order; a larger tensor has a shard to itself."""
    shards: list[Shapes] = []
    room = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if not shards or size > room:
            shards.append({})
            room = limit
        shards[-1][name] = shape
        room -= size
    return shards


def values(name: str, shape: tuple[int, ...], pool: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """The values of one tensor, in pieces of the pool."""
    places = random.Random(derive_seed(seed, "tensor", name))
    left = math.prod(shape)
    while left:
        length = min(left, STRETCH)
        start = places.randrange(len(pool) - length + 1)
        yield pool[start : start + length]
        left -= length


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; padding, start and end of text are 256, 257, 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, *special])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )


def write_weights(directory: Path, model: Any, dtype: torch.dtype, shard_size: int, seed: int) -> None:
    """Write the shards one after the other, and their index."""
    shapes, ones = tensor_shapes(model), norm_weights(model)
    generator = torch.Generator().manual_seed(derive_seed(seed, "pool"))
    pool = (torch.randn(POOL, generator=generator) * model.config.initializer_range).to(dtype)
    shards = split(shapes, dtype.itemsize, shard_size)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = directory / f"model{suffix}.safetensors"
        weight_map.update(dict.fromkeys(shard, file.name))
        pieces = (
            piece
            for name in sorted(shard)
            for piece in (
                [torch.ones(shard[name], dtype=dtype)] if name in ones else values(name, shard[name], pool, seed)
            )
        )
        write_tensors(file, {name: (dtype, shape) for name, shape in shard.items()}, pieces)
        print(f"{file.name}: {file.stat().st_size / 1e9:.2f} GB", file=sys.stderr, flush=True)
    if len(shards) > 1:
        count = sum(math.prod(shape) for shape in shapes.values())
        metadata = {"total_parameters": count, "total_size": count * dtype.itemsize}
        write_json(directory / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def make_synthetic_llm(
    out: Path,
    like: str,
    *,
    dtype: str = "bf16",
    shard_size: int = 5 * 10**9,
    seed: int = 0,
    blocks: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a random checkpoint of the shape of `like`.

    Args:
        out: Directory to write.
        like: A key of `CONFIGS`.
        dtype: A key of `DTYPES`.
        shard_size: Bytes of a shard at most.
        seed: Seed of the weights.
        blocks: Number of blocks instead of the published one.
        overwrite: Replace `out`.

    Raises:
        UsageError: `out` exists, or there cannot be that many blocks.
        ResourceError: the disk has too little room.
    """
    config = {**CONFIGS[like], "dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    if blocks is not None:
        if blocks < 1:
            raise UsageError(f"--blocks must be at least 1, got {blocks}.")
        config["num_hidden_layers"] = blocks
    model = skeleton(config)
    size = sum(math.prod(shape) for shape in tensor_shapes(model).values()) * DTYPES[dtype].itemsize
    require_space(next(folder for folder in out.absolute().parents if folder.is_dir()), size)
    with new_directory(out, overwrite=overwrite, sign="config.json") as directory:
        write_json(directory / "config.json", dict(sorted(config.items())))
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(directory)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(directory / "generation_config.json", special)
        write_weights(directory, model, DTYPES[dtype], shard_size, seed)
    return out


def byte_count(text: str) -> int:
    """Read "5GB", "200MiB" or "1000000"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in UNITS or not (count := int(float(found[1]) * UNITS[found[2]])):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 5GB")
    return count


def main() -> None:
    """Parse the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", choices=CONFIGS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shard-size", type=byte_count, default="5GB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, help="number of blocks, instead of the published one")
    parser.add_argument("--overwrite", action="store_true")
    args = vars(parser.parse_args())
    try:
        out = make_synthetic_llm(args.pop("out"), args.pop("like"), **args)
    except FedproxyError as error:
        sys.exit(f"Error: {error}")
    print(json.dumps({"path": str(out)}))


if __name__ == "__main__":
    main()
