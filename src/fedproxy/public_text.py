"""Public text, such as calibration text: read from a file, drawn by seed."""

import gzip
import hashlib
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedproxy.artifacts import parse_json
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.seeds import derive_seed

_ROW_FORMATS = (("text",), ("prompt", "completion"), ("instruction", "input", "output"), ("instruction", "output"))


def read_documents(text: str | Path | Sequence[str]) -> tuple[list[str], str]:
    """Read the documents of a text file (separated by blank lines) or of a JSON Lines file, gzipped or not.

    A line of a `.jsonl` file holds "text", "prompt" and "completion", or Alpaca's "instruction", "input" and "output".
    A list of documents is taken as it is, and hashed as a file with a blank line between them.

    Returns:
        The documents in order, none empty, and the SHA-256 of the uncompressed file.

    Raises:
        ArtifactError: the file is missing, damaged, of another format, or holds no text; a bad line is named.
    """
    if not isinstance(text, str | Path):
        if not (text and all(isinstance(document, str) and document.strip() for document in text)):
            raise ArtifactError("public text in memory must be a list of strings, at least one and none empty.")
        return list(text), hashlib.sha256("\n\n".join(text).encode()).hexdigest()
    path = Path(text)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        decoded = content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"public text {path} cannot be read: {reason}.") from error
    kind = Path(path.stem if path.suffix == ".gz" else path.name).suffix
    if kind == ".json":
        raise ArtifactError(f"public text {path} is JSON. Write it as JSON Lines (.jsonl), one object a line.")
    documents = _json_lines(decoded, path) if kind == ".jsonl" else _paragraphs(decoded)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ArtifactError(f"public text {path} holds no text. Give some hundred documents of public text.")
    return documents, hashlib.sha256(content).hexdigest()


def _paragraphs(text: str) -> list[str]:
    documents: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            documents[-1].append(line)
        elif documents[-1]:
            documents.append([])
    return ["\n".join(lines) for lines in documents]


def _json_lines(text: str, path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row: Any = parse_json(line, f"public text {path}, line {number}")
        keys = next((keys for keys in _ROW_FORMATS if isinstance(row, dict) and set(keys) <= set(row)), None)
        if keys is None or not all(isinstance(row[key], str) for key in keys):
            raise ArtifactError(
                f"public text {path}, line {number}: needs the strings 'text', 'prompt' and 'completion', "
                "or 'instruction', 'input' and 'output'."
            )
        parts = [row[key] for key in keys if row[key]]
        documents.append(("" if keys[0] == "prompt" else "\n").join(parts))
    return documents


def draw(documents: Sequence[str], samples: int, seed: int) -> list[str]:
    """Draw `samples` documents without replacement, or all if there are no more than that.

    Raises:
        UsageError: `samples` is not positive.
    """
    if samples < 1:
        raise UsageError(f"samples must be at least 1, got {samples}.")
    if samples >= len(documents):
        return list(documents)
    return random.Random(derive_seed(seed, "calibration")).sample(list(documents), samples)
