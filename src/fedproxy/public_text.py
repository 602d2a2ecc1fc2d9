"""Public text, such as calibration text: read from a file, drawn by seed."""

import gzip
import hashlib
import random
import zlib
from collections.abc import Sequence
from pathlib import Path

from fedproxy.errors import ArtifactError, UsageError
from fedproxy.row_files import holds_rows, numbered_rows
from fedproxy.row_formats import Row, check_row, in_trl_form
from fedproxy.seeds import derive_seed


def read_documents(text: str | Path | Sequence[str]) -> tuple[list[str], str]:
    """Read the documents of a text file (separated by blank lines) or of a file of rows, which are clients' formats.

    A name that ends in .jsonl or in another end that `numbered_rows` knows says that the file holds rows, and so does a
    folder. Of a row count its text, its prompt with its completion, or its messages, one below the other. A list of
    documents is taken as it is, and hashed as a file with a blank line between them; so are the documents of a folder.

    Returns:
        The documents in order, none empty, and the SHA-256 of the uncompressed file.

    Raises:
        ArtifactError: the file is missing, damaged, of another format, or holds no text; a bad row is named.
        MissingExtraError: as of `numbered_rows`.
    """
    if not isinstance(text, str | Path):
        if not (text and all(isinstance(document, str) and document.strip() for document in text)):
            raise ArtifactError("public text in memory must be a list of strings, at least one and none empty.")
        return list(text), _sha256(text)
    path = Path(text)
    content = b"" if path.is_dir() else _content(path)
    documents = _of_rows(path) if holds_rows(path) else _paragraphs(_decoded(path, content))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ArtifactError(f"public text {path} holds no text. Give some hundred documents of public text.")
    return documents, hashlib.sha256(content).hexdigest() if content else _sha256(documents)


def _sha256(documents: Sequence[str]) -> str:
    return hashlib.sha256("\n\n".join(documents).encode()).hexdigest()


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ArtifactError(
            f"public text {path} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from error


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"public text {path} cannot be read: {error}.") from error


def _paragraphs(text: str) -> list[str]:
    documents: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            documents[-1].append(line)
        elif documents[-1]:
            documents.append([])
    return ["\n".join(lines) for lines in documents]


def _of_rows(path: Path) -> list[str]:
    documents = []
    for where, row in numbered_rows(path):
        try:
            documents.append(_document(in_trl_form(row)))
        except (ValueError, ArtifactError) as error:
            raise ArtifactError(f"public text {path}, {where}: {str(error).rstrip('.')}.") from error
    return documents


def _document(row: Row) -> str:
    if "messages" in row:
        check_row(row)
        return "\n".join(message["content"] for message in row["messages"] if message["content"])
    fields = ["text"] if "text" in row else ["prompt", "completion"]
    for name in fields:  # which may be empty here
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name} is {'no string' if name in row else 'missing'}")
    document = "".join(row[name] for name in fields)
    return document if row[fields[-1]] else document.removesuffix("\n")


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
