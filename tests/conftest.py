"""Tiny random models of every family, with a byte-level tokenizer, made on the spot."""

import contextlib
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from tests.browser import Browser

VOCABULARY = 260
BLOCKS = 6
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
_LLAMA = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_GEMMA = {**_LLAMA, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 8},
    "qwen2": {**_LLAMA, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {**_LLAMA, "head_dim": 8},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
    "phi3": _LLAMA,
    "olmo2": _LLAMA,
    "granite": _LLAMA,
    "smollm3": {**_LLAMA, "no_rope_layers": [1, 1, 0, 1, 0, 1]},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": BLOCKS,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.15,
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": 258,
    },
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.15},
    "gpt_neox": {**_COMMON, "intermediate_size": 48},
    "bloom": _COMMON,
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_LLAMA, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**_GEMMA, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        "mm_tokens_per_image": 1,
    },
    "llava": {
        "text_config": {"model_type": "llama", **_LLAMA},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "projection_dim": 16,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
    },
}
"""Models with a text decoder among other parts; the vision tower has as many blocks, to be confused with."""


def pytest_configure(config: pytest.Config) -> None:
    """Let PEFT's use of a deprecated property of transformers pass; tiny models are fastest on one thread."""
    torch.set_num_threads(1)
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    logging.disable_progress_bar()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests of 4-bit weights to the environment that has bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        left_out = [item for item in items if item.get_closest_marker("qlora")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def make_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of `family` with six blocks, unless `changes` say otherwise."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **{**(FAMILIES | MULTIMODAL)[family], **changes})
        kind = AutoModelForImageTextToText if family in MULTIMODAL else AutoModelForCausalLM
        model: PreTrainedModel = kind.from_config(config)
    return model.to(dtype).eval()


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


@pytest.fixture(params=[0o002, 0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """What a user's umask takes away, while it is set."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """A function that makes a tiny random model: `tiny_model("gpt2", seed=1, dtype=..., num_hidden_layers=4)`."""
    return make_model


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The one Chromium of these tests; each page that it opens is a stranger to the others."""
    with contextlib.closing(Browser(tmp_path_factory.mktemp("chromium"))) as shown:
        yield shown


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that gives the directory of such a model with its tokenizer; shared: do not write into it."""
    made: dict[str, Path] = {}

    def checkpoint(family: str = "llama", **changes: Any) -> Path:
        key = repr((family, sorted(changes.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("llm") / family
            make_model(family, **changes).save_pretrained(made[key])
            make_tokenizer().save_pretrained(made[key])
        return made[key]

    return checkpoint


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small calibration text of eight documents."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n\n".join(f"Document {i} says that {'very ' * i}little happens." for i in range(8)))
    return path
