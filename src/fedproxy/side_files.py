"""What of a checkpoint beside its weights may leave the house: files by a list of names, settings without places."""

import re
from collections.abc import Mapping
from typing import Any

from fedproxy.checkpoint_files import CONFIG

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.[0-9]*.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "vocab-src.json", "vocab-tgt.json", "entity_vocab.json", "target_vocab.json"),
    *("merges.txt", "bpe.codes", "dict.txt", "tekken.json", "tokenizer.model", "tokenizer.model.v[0-9]*"),
    *("sentencepiece.model", "sentencepiece.bpe.model", "spiece.model", "spm.model", "spm_char.model", "source.spm"),
    *("target.spm", "tiktoken.model", "qwen.tiktoken", "prophetnet.tokenizer", "byte_maps.json", "emoji.json"),
    *("normalizer.json", "word_pronunciation.json", "word_shape.json"),
)
"""What transformers' tokenizers read; all else beside the weights stays with their owner (docs/threat_model.md)."""
SIDE_FILES = (*TOKENIZER_FILES, "generation_config.json", "chat_template.jinja")

_TOKENS = re.compile(r"\w+_tokens?|added_tokens_decoder|chat_template|response_schema")
_TEXTS = {
    TOKENIZER_CONFIG: _TOKENS,
    "special_tokens_map.json": _TOKENS,
    "generation_config.json": re.compile("stop_strings"),
}
"""Files of settings in which the values of some keys are texts that a model reads or writes."""
_WORD = re.compile(r"[\w.+-]{0,200}")
_PLACES = re.compile(r".*_(file|path|dir)|((use_)?auth_|hf_|access_)?token")
"""Keys that name places of the owner's machine, or give access to the Hub."""
_GONE = object()


def is_settings(name: str) -> bool:
    """Whether a file of a checkpoint is one of settings, which leave cleaned."""
    return name == CONFIG or name in _TEXTS


def cleaned(name: str, record: Any) -> dict[str, Any]:
    """The content of a file of settings as it leaves: numbers, switches and words, under keys that are words.

    A path is no word, nor is what names code in a repository of the Hub. Texts that a model reads or writes (special
    tokens, chat templates, strings that end an answer) stay as they are, where the file is one that has such.

    Example:
        >>> cleaned("config.json", {"hidden_size": 8, "data": "/home/me", "attn_implementation": "org/kernel"})
        {'hidden_size': 8}
    """
    texts = _TEXTS.get(name, re.compile("(?!)"))
    return dict(_cleaned(record, "", texts)) if isinstance(record, Mapping) else {}


def _cleaned(value: Any, key: str, texts: re.Pattern[str]) -> Any:
    """A value without what stays; a list that would lose an entry stays as a whole."""
    if _PLACES.fullmatch(key) and isinstance(value, str):
        return _GONE
    if texts.fullmatch(key):
        return value
    if isinstance(value, Mapping):
        kept = {name: _cleaned(entry, str(name), texts) for name, entry in value.items() if _WORD.fullmatch(str(name))}
        return {name: entry for name, entry in kept.items() if entry is not _GONE}
    if isinstance(value, list | tuple):
        entries = [_cleaned(entry, key, texts) for entry in value]
        return _GONE if any(entry is _GONE for entry in entries) else entries
    hub = key.startswith("Auto") and isinstance(value, str) and "--" in value
    return _GONE if hub or (isinstance(value, str) and not _WORD.fullmatch(value)) else value
