"""The rows of a file as people have them: JSON Lines, a JSON array, CSV, TSV, Parquet, or a folder of `datasets`.

All come as plain values, one row at a time, and nothing is guessed: a cell of a CSV stays the text that it is, where
pandas would take 007 for 7 and NA for nothing.
"""

import csv
import gzip
import importlib
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fedproxy.artifacts import parse_json
from fedproxy.errors import ArtifactError, MissingExtraError, UsageError

Row = dict[str, Any]
Numbered = Iterator[tuple[str, Any]]
"""Where a row stands, such as "line 3", and the row."""

_CELL = 64 << 20
"""Characters of a cell of a CSV at most: a quote that is never closed takes all that follows it."""
_BATCH = 1000
"""Rows of an Arrow table that are Python values at a time."""
_BLANK = re.compile(r"[ \t\r\n]*")


def format_of(path: Path) -> str:
    """The name of a file's format, which the end of its name tells; .gz may follow that of a text."""
    return _format(path)[0]


def holds_rows(path: Path) -> bool:
    """Whether the name of a file says that it holds rows, and not a text; a folder does."""
    return path.is_dir() or any(_bare_name(path).endswith(end) for end in _ENDS)


def numbered_rows(path: Path, limit: int | None = None) -> Iterator[tuple[str, Row]]:
    """Read a file's rows with where each stands in it, such as "line 3" or "row 3".

    A name that ends in .json, .csv, .tsv or .parquet says the format; a folder is one that `datasets` saved
    (`save_to_disk`), of whose splits "train" is read; all else is JSON Lines. Texts are UTF-8, and may be gzipped.

    Raises:
        ArtifactError: the file is missing, empty or damaged, or a row is no object; file and row are named.
        MissingExtraError: the file is Parquet or a folder, and the library `datasets` is not installed.
        UsageError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} rows: give at least 1.")
    count = 0
    for where, row in _format(path)[1](path):
        if not isinstance(row, dict):
            raise ArtifactError(f"{path}, {where}: a JSON {type(row).__name__}, where an object is expected.")
        yield where, row
        count += 1
        if count == limit:
            return
    if not count:
        raise ArtifactError(f"{path} holds no rows.")


def _format(path: Path) -> tuple[str, Callable[[Path], Numbered]]:
    if path.is_dir():
        return "folder of datasets", _saved
    name = _bare_name(path)
    return next((found for end, found in _ENDS.items() if name.endswith(end)), _ENDS[".jsonl"])


def _bare_name(path: Path) -> str:
    return path.name.lower().removesuffix(".gz")


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArtifactError(f"{path} is no gzip file, or is truncated: {error}.") from error
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error


def _json_lines(path: Path) -> Numbered:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield f"line {number}", _line_value(path, line, number)


def _line_value(path: Path, line: bytes, number: int) -> Any:
    try:
        return parse_json(line, f"{path}, line {number}")
    except ArtifactError as error:
        if holds_rows(path):
            raise
        ends = ", ".join(_ENDS)
        raise ArtifactError(f"{error} The name has none of the ends {ends}, so it is read as JSON Lines.") from error


def _json(path: Path) -> Numbered:
    """The elements of an array; a file that begins with another value is JSON Lines, which many call .json."""
    first = next((bare for line in _lines(path) if (bare := line.removeprefix(BOM_UTF8).strip())), b"")
    yield from (_array if first.startswith(b"[") else _json_lines)(path)


def _array(path: Path) -> Numbered:
    # Bytes that are no UTF-8 survive until their row is parsed, so that it can be named.
    text = b"".join(_lines(path)).decode("utf-8-sig", "surrogateescape")
    decoder, place, number = json.JSONDecoder(), text.index("[") + 1, 1
    if text.startswith("]", first := _after_blank(text, place)):
        place, number = first, 0
    while number:
        where, begin = f"{path}, row {number}", _after_blank(text, place)
        try:
            _, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{where} is not valid JSON: {error!s:.300}.") from error
        yield f"row {number}", parse_json(text[begin:end].encode("utf-8", "surrogateescape"), where)
        place = _after_blank(text, end)
        if text.startswith("]", place):
            break
        if not text.startswith(",", place):
            found = repr(text[place]) if place < len(text) else "the end of the file"
            raise ArtifactError(f"{where}: {found} follows, where a comma or the array's end is expected.")
        place, number = place + 1, number + 1
    if _after_blank(text, place + 1) < len(text):
        raise ArtifactError(f"{path}: text follows the array's end, after row {number}.")


def _after_blank(text: str, place: int) -> int:
    found = _BLANK.match(text, place)
    return found.end() if found else place


def _separated(path: Path, separator: str) -> Numbered:
    csv.field_size_limit(_CELL)
    reader = csv.reader(_decoded(path), delimiter=separator, strict=True)
    number, begin = 0, 1
    try:
        names = next((cells for cells in reader if cells), [])
        _check_names(path, names)
        _check_separator(path, names, separator)
        begin = reader.line_num + 1
        for cells in reader:
            where, begin = f"row {number + 1} (line {begin})", reader.line_num + 1
            if not cells:
                continue
            number += 1
            if len(cells) != len(names):
                raise ArtifactError(
                    f"{path}, {where}: {len(cells)} cells, where the header names {len(names)} columns: "
                    f"{', '.join(names)}."
                )
            yield where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        what = "a quote is opened and never closed" if str(error) == "unexpected end of data" else error
        raise ArtifactError(f"{path}, row {number + 1} (line {begin}): {what}.") from error


def _check_separator(path: Path, names: list[str], separator: str) -> None:
    """Refuse a header that is one column of what looks like several, as Excel writes it in many countries."""
    others = ";\t,|".replace(separator, "")
    other = next((mark for mark in others if len(names) == 1 and mark in names[0]), None)
    if other:
        raise ArtifactError(
            f"{path}, line 1: the header is one column, {names[0]!r:.300}. Between columns {separator!r} is expected, "
            f"not {other!r}: save it with {separator!r}" + (", or name it .tsv." if other == "\t" else ".")
        )


def _decoded(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(
                f"{path}, line {number} is not UTF-8: {error}. Save the file as UTF-8; Excel calls it CSV UTF-8."
            ) from error


def _check_names(path: Path, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ArtifactError(f"{path}: two columns are called {name!r}.")
        seen.add(name)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("a file in Parquet, or a folder of datasets,", "data") from error


def _parquet(path: Path) -> Numbered:
    parquet = _library("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            yield from _arrow_rows(path, file.iter_batches(_BATCH))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}.") from error
    except ValueError as error:  # what pyarrow raises is one
        raise ArtifactError(f"{path} is no Parquet file, or is damaged: {_told(error)}.") from error


def _saved(path: Path) -> Numbered:
    datasets = _library("datasets")
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises whatever its parsers do
        raise ArtifactError(
            f"{path} is no folder that datasets' save_to_disk wrote, or is damaged: {_told(error)}."
        ) from error
    if isinstance(found, dict):
        split = "train" if "train" in found else next(iter(found)) if len(found) == 1 else None
        if split is None:
            raise ArtifactError(f"{path} holds the splits {', '.join(found)} and no train. Give one's own folder.")
        found = found[split]
    yield from _arrow_rows(path, found.with_format("arrow").iter(_BATCH))


def _arrow_rows(path: Path, tables: Iterator[Any]) -> Numbered:
    number = 0
    try:
        for table in tables:
            for row in _values(table):
                yield f"row {(number := number + 1)}", row
    except Exception as error:  # the library raises whatever its decoders do
        raise ArtifactError(f"{path}, row {number + 1}: {_told(error)}.") from error


def _told(error: Exception) -> str:
    return str(error)[:300].rstrip(".")


def _values(table: Any) -> Iterator[Row]:
    """The rows of an Arrow table; a row that cannot be read comes after those before it."""
    try:
        yield from table.to_pylist()
    except ValueError:
        for place in range(table.num_rows):
            yield from table.slice(place, 1).to_pylist()


_ENDS: dict[str, tuple[str, Callable[[Path], Numbered]]] = {
    ".jsonl": ("JSON Lines", _json_lines),
    ".json": ("JSON", _json),
    ".csv": ("CSV", lambda path: _separated(path, ",")),
    ".tsv": ("TSV", lambda path: _separated(path, "\t")),
    ".parquet": ("Parquet", _parquet),
}
