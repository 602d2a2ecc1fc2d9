"""Hugging Face checkpoints, by directory or Hub id: loaded only if complete, without code of their own."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fedproxy.artifacts import read_header, weight_files
from fedproxy.errors import ArtifactError, ResourceError

Model = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def resolve(path: str | Path) -> Path:
    """Return the directory of a checkpoint; a Hub id is downloaded to the Hub's cache (safetensors, never pickle).

    Raises:
        ArtifactError: there is neither such a directory nor such a model on the Hub.
    """
    if Path(path).is_dir():
        return Path(path)
    if not _HUB_ID.fullmatch(str(path)):
        raise ArtifactError(f"{path} is no checkpoint: there is no such directory, and it is no Hub id.")
    try:
        with _quiet():
            return Path(snapshot_download(str(path), allow_patterns=_HUB_FILES))
    except Exception as error:
        raise ArtifactError(
            f"{path} is no checkpoint: there is no such directory, and the Hub could not give it "
            f"({type(error).__name__}). Check the spelling and the network."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model in evaluation state.

    Args:
        path: Directory or Hub id.
        dtype: Data type of the weights; the checkpoint's own if none.
        trust_remote_code: Run Python code that the checkpoint brings.

    Returns:
        The model, every weight of which came from the checkpoint.

    Raises:
        ArtifactError: it is no checkpoint of a causal language model, is damaged, or lacks weights.
        ResourceError: it does not fit into memory.
    """
    directory = resolve(path)
    for file in weight_files(directory):
        read_header(file)
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype="auto" if dtype is None else dtype,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(f"{path} does not fit into memory. Use a machine with more.") from error
    except Exception as error:
        raise ArtifactError(f"{path} cannot be loaded as a causal language model: {_first_line(error)}") from error
    model, loading = loaded
    lost = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if lost:
        raise ArtifactError(f"{path} lacks {len(lost)} weights of its architecture, or has other shapes: {lost[:3]}.")
    found: PreTrainedModel = model.eval()
    return found


def load_skeleton(path: str | Path) -> PreTrainedModel:
    """Build the model of a checkpoint without its weights (on the meta device), to look at names and shapes.

    Raises:
        ArtifactError: its configuration is of no causal language model.
    """
    directory = resolve(path)
    try:
        with _quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ArtifactError(f"{path} describes no causal language model: {_first_line(error)}") from error
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint; one without a padding token pads with its end of text.

    Raises:
        ArtifactError: there is no tokenizer that can be loaded.
    """
    directory = resolve(path)
    try:
        with _quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise ArtifactError(f"{path} has no tokenizer that can be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_checkpoint(directory: Path, model: PreTrainedModel, source: Path) -> None:
    """Write model (its own data type) and generation config into `directory`, with the tokenizer files of `source`.

    The tokenizer files are copied to the byte: a loaded tokenizer remembers settings of its use, such as truncation.

    Raises:
        ResourceError: the disk is full.
    """
    try:
        with _quiet():
            model.save_pretrained(directory)
    except SafetensorError as error:
        if "No space left" in str(error):
            raise ResourceError(f"{directory}: no space left on device. Free some space.") from error
        raise
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, directory / file.name)
    for file in directory.iterdir():
        file.chmod(0o644)
