"""Hugging Face checkpoints, by directory or Hub id: loaded only if complete, without code of their own."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE

from fedproxy.artifacts import CONFIG_BYTES, read_json, write_json
from fedproxy.checkpoint_files import CONFIG, check_place, numbered_lists, open_checkpoint, weight_names
from fedproxy.errors import ArtifactError, ResourceError
from fedproxy.models.loading import Loader, quiet
from fedproxy.models.tokens import prepare
from fedproxy.side_files import SIDE_FILES, TOKENIZER_CONFIG, TOKENIZER_FILES, cleaned, is_settings

Model = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase

_HUB_SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/[^/]+")
_WHOLE_FILES = (*SIDE_FILES, "*processor_config.json", "audio_tokenizer_config.json", "chat_template.json")
_MOST_BLOCKS = 10_000
_HUB_FILES = [*SIDE_FILES, "*.json", "*.txt", "*.jinja", "*.py"]


def resolve(path: str | Path, *, weights: bool = True) -> Path:
    """Return the directory of a checkpoint; a Hub id is downloaded to the Hub's cache (safetensors, never pickle).

    Args:
        path: Directory or Hub id.
        weights: Download the weights, too; else only what describes the model, and its tokenizer.

    Raises:
        ArtifactError: there is neither such a directory nor such a model on the Hub, or its licence was not accepted.
    """
    if Path(path).is_dir():
        return Path(path)
    check_place(path)
    try:
        with quiet():
            found = Path(snapshot_download(str(path), allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
            more = [
                f"{CHAT_TEMPLATE_DIR}/*.jinja",
                *(name for name in weight_names(found) if weights and name.endswith(".safetensors")),
            ]
            return Path(snapshot_download(str(path), revision=found.name, allow_patterns=more))
    except GatedRepoError as error:
        raise ArtifactError(
            f"{path} is gated on the Hub: accept its licence on its page there, then log in with: hf auth login"
        ) from error
    except Exception as error:
        raise ArtifactError(
            f"{path} is no checkpoint: there is no such directory, and the Hub could not give it "
            f"({type(error).__name__}). Check the spelling and the network."
        ) from error


def hub_id(directory: Path) -> str | None:
    """The Hub id of a checkpoint that lies in the Hub's cache; none of any other."""
    match = _HUB_SNAPSHOT.fullmatch(str(directory))
    return match and match[1].replace("--", "/")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _auto_class(config: Any) -> Any:
    """The auto class that knows the models of `config`."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Read the configuration of a checkpoint, whose weights need not be there.

    Raises:
        ArtifactError: there is none, or it is of no language model that transformers knows, needs code of its own, is
            quantised, or counts more blocks than any has.
    """
    directory = resolve(path, weights=False)
    if not (directory / CONFIG).is_file():
        raise ArtifactError(f"{directory} is no Hugging Face checkpoint: {CONFIG} is missing.")
    raw = read_json(directory / CONFIG, CONFIG_BYTES)
    if not isinstance(raw, dict):
        raise ArtifactError(f"{directory / CONFIG} must hold a JSON object.")
    kind = raw.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if "auto_map" in raw and not known and not trust_remote_code:
        raise ArtifactError(
            f"{directory} brings Python code of its own ({kind}). Read it, and if you trust "
            "it, say so with trust_remote_code."
        )
    quantised = raw.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method", "an unnamed method") if isinstance(quantised, dict) else quantised
        raise ArtifactError(
            f"{directory} is quantised ({method}). Use the checkpoint it was made from, in bfloat16, float16 or "
            "float32, or dequantise it first."
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code and not known
            )
        count = config.get_text_config(decoder=True).num_hidden_layers
    except Exception as error:
        raise ArtifactError(f"{directory} describes no language model: {_first_line(error)}") from error
    if type(count) is not int or not 0 <= count <= _MOST_BLOCKS:
        raise ArtifactError(f"{directory}: the configuration says {count} blocks; a model has {_MOST_BLOCKS} at most.")
    return config


def load_skeleton(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model of a checkpoint without its weights (on the meta device), to look at names and shapes.

    Raises:
        ArtifactError: see `load_config`; or the files hold another number of blocks, or lack weights of the model.
    """
    directory = resolve(path)
    files = open_checkpoint(directory)
    config = load_config(directory, trust_remote_code=trust_remote_code)
    count, lists = config.get_text_config(decoder=True).num_hidden_layers, numbered_lists(files.tensors)
    if set(range(count)) not in lists.values():
        found = {path: len(numbers) for path, numbers in lists.items()}
        raise ArtifactError(f"{directory}: the configuration says {count} blocks, the weights hold {found or 'none'}.")
    skeleton = build_skeleton(directory, config, files.dtype, trust_remote_code=trust_remote_code)
    empty = {
        name: torch.empty(stored.shape, dtype=stored.torch_dtype, device="meta")
        for name, stored in files.tensors.items()
    }
    lost = Loader(skeleton, torch.device("meta")).load(empty)
    if lost:
        raise ArtifactError(f"{path} lacks {len(lost)} weights of its architecture, or has other shapes: {lost[:3]}.")
    skeleton.tie_weights()
    return skeleton


def build_skeleton(
    directory: Path, config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model of a configuration on the meta device, in `dtype` where the configuration names none.

    Raises:
        ArtifactError: transformers knows no such model.
    """
    own_code = type(config).__module__.startswith("transformers_modules")
    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = _auto_class(config).from_config(
                config,
                dtype=dtype if config.dtype is None or config.dtype.itemsize == 1 else config.dtype,
                trust_remote_code=trust_remote_code and own_code,
            )
    except Exception as error:
        raise ArtifactError(f"{directory} describes no causal language model: {_first_line(error)}") from error
    model.train(False)
    return model


def fresh_model(path: str | Path, *, seed: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of the shape of a checkpoint, in float32, whose weights are drawn as before any training.

    Args:
        path: Directory or Hub id; its weights are not read.
        seed: Seed of the weights.
        trust_remote_code: Let the checkpoint's own Python code run.

    Raises:
        ArtifactError: see `load_config`.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model: PreTrainedModel = _auto_class(config).from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    model.train(False)
    return model


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in evaluation state.

    Args:
        path: Directory or Hub id.
        dtype: Data type of the weights; the checkpoint's own if none.
        device_map: "auto" spreads the model over the GPUs there are.
        quantization: How to quantise the weights of linear layers, from `models.quantization`; not at all if none.
        trust_remote_code: Run Python code that the checkpoint brings.

    Returns:
        The model, every weight of which came from the checkpoint.

    Raises:
        ArtifactError: it is no checkpoint of a causal language model, is damaged, or lacks weights.
        ResourceError: it does not fit into memory.
    """
    directory = resolve(path)
    config = load_skeleton(directory, trust_remote_code=trust_remote_code).config
    own_code = type(config).__module__.startswith("transformers_modules")
    try:
        with quiet():
            loaded: Any = _auto_class(config).from_pretrained(
                directory,
                dtype="auto" if dtype is None else dtype,
                device_map=device_map,
                quantization_config=quantization,
                trust_remote_code=trust_remote_code and own_code,
                local_files_only=True,
                use_safetensors=True,
            )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(f"{path} does not fit into memory. Use a machine with more.") from error
    except Exception as error:
        raise ArtifactError(f"{path} cannot be loaded as a causal language model: {_first_line(error)}") from error
    found: PreTrainedModel = loaded.eval()
    return found


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint, prepared for text that goes on (`tokens.prepare`).

    Raises:
        ArtifactError: there is no tokenizer that can be loaded, or it does not fit the model.
    """
    directory = resolve(path)
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        if not any(file.is_file() for pattern in TOKENIZER_FILES for file in directory.glob(pattern)):
            raise ArtifactError(
                f"{path} holds no tokenizer. Copy the files of the tokenizer that belongs to the model there "
                "(tokenizer.json, tokenizer_config.json)."
            ) from error
        cause = _first_line(error).rstrip(" :.")
        raise ArtifactError(
            f"{path} has no tokenizer that can be loaded ({cause}). Copy its files there anew."
        ) from error
    raw = read_json(directory / CONFIG, CONFIG_BYTES) if (directory / CONFIG).is_file() else {}
    vocabulary = {**raw, **(raw.get("text_config") or {})}.get("vocab_size")
    return prepare(tokenizer, vocabulary if type(vocabulary) is int else None)


def padding(tokenizer: Tokenizer) -> int:
    """The token that rows are padded with: token 0 where the tokenizer names neither one nor an end of text.

    It may be any, since no attention goes to padding and none of it counts.
    """
    return tokenizer.pad_token_id or 0


def copy_tokenizer(source: Path, directory: Path, *, whole: bool = False) -> None:
    """Copy the files beside the weights: tokenizer, chat templates, generation settings; if `whole`, processors, too.

    To the byte, because a loaded tokenizer remembers settings of its use, such as truncation. Only what settings hold
    that may not leave goes (`side_files.cleaned`), unless `whole`, and templates of their own folder move, into the
    tokenizer's configuration, so that a proxy is a folder of plain files.

    Raises:
        ArtifactError: a file of settings is no JSON.
    """
    for pattern in _WHOLE_FILES if whole else SIDE_FILES:
        for file in filter(Path.is_file, source.glob(pattern)):
            record = None if whole or not is_settings(file.name) else read_json(file)
            if record is not None and record != (left := cleaned(file.name, record)):
                write_json(directory / file.name, left)
            else:
                shutil.copyfile(file, directory / file.name)
    named = {file.stem: file.read_text("utf-8") for file in sorted(source.glob(f"{CHAT_TEMPLATE_DIR}/*.jinja"))}
    if named:
        settings, single = directory / TOKENIZER_CONFIG, directory / CHAT_TEMPLATE_FILE
        record = read_json(settings) if settings.is_file() else {}
        if single.is_file():
            named["default"] = single.read_text("utf-8")
            single.unlink()
        listed = [{"name": name, "template": template} for name, template in named.items()]
        write_json(settings, {**record, "chat_template": listed})


def save_checkpoint(directory: Path, model: PreTrainedModel, source: Path) -> None:
    """Write model (its own data type) and generation config into `directory`, with the tokenizer files of `source`.

    Raises:
        ResourceError: the disk is full.
    """
    try:
        with quiet():
            model.save_pretrained(directory)
    except SafetensorError as error:
        if "No space left" in str(error):
            raise ResourceError(f"{directory}: no space left on device. Free some space.") from error
        raise
    for file in directory.iterdir():
        file.chmod(directory.stat().st_mode & 0o666)  # safetensors makes files of mode 0600 whatever the umask
    copy_tokenizer(source, directory)
