"""The clients' rows: read from a file in whatever format, checked one by one, and divided among clients."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedproxy.errors import ArtifactError, UsageError
from fedproxy.row_files import Row, numbered_rows
from fedproxy.row_formats import check_row, in_trl_form, unanswered
from fedproxy.seeds import derive_seed

_log = logging.getLogger(__name__)

_SCHEMES = ("dirichlet", "iid")


def read_objects(path: Path, limit: int | None = None) -> list[Row]:
    """Read a file of objects of any fields; formats and errors are those of `numbered_rows`."""
    return [row for _, row in numbered_rows(Path(path), limit)]


def read_rows(path: str | Path | Sequence[Row], limit: int | None = None) -> list[Row]:
    """Read training rows in one of TRL's formats, Alpaca's or ShareGPT's; further fields, such as a label, are kept.

    Args:
        path: A file or folder as of `numbered_rows`. Or the rows themselves, to be checked.
        limit: Read at most this many rows; None reads all.

    Returns:
        The rows in order, all of the same format, in the form of `in_trl_form`: of a conversation one list of messages,
        whose last is the answer. Those that are `unanswered` are left out, and a line of the log says so.

    Raises:
        ArtifactError: the file is missing, empty or damaged, a row is no object, a field has the wrong type or is
            empty, or the rows are of no known format or of several; file and row are named.
        MissingExtraError: the file is Parquet or a folder, and the library `datasets` is not installed.
        UsageError: `limit` is below 1.

    Example:
        A line of a JSON Lines file that `read_rows` takes: `{"prompt": "2 + 2 =", "completion": " 4"}`
    """
    if isinstance(path, str | Path):
        numbered, source = numbered_rows(Path(path), limit), f"{path}, "
    else:
        numbered, source = ((f"row {number}", row) for number, row in enumerate(path[:limit], 1)), ""
    rows: list[Row] = []
    left_out: list[str] = []
    first = ""
    for where, row in numbered:
        try:
            if not isinstance(row, Mapping):
                raise ValueError(f"a {type(row).__name__}, where an object is expected")
            if unanswered(row):
                left_out.append(where)
                continue
            row = in_trl_form(row)
            kind = check_row(row)
        except (ValueError, ArtifactError) as error:
            raise ArtifactError(f"{source}{where}: {str(error).rstrip('.')}.") from error
        first = first or kind
        if kind != first:
            raise ArtifactError(
                f"{source}{where}: a row of the format {kind}, the rows above are of the format {first}. "
                "Give each format a file of its own."
            )
        rows.append(row)
    if left_out and not rows:
        raise ArtifactError(f"{source}{left_out[0]}: output is empty, as in all the rows.")
    if left_out:
        _log.warning("%s%s: output is empty. Such rows are left out, %d in all.", source, left_out[0], len(left_out))
    return rows


def partition(
    rows: Sequence[Row], clients: int, scheme: str = "iid", alpha: float = 0.5, seed: int = 0, label: str | None = None
) -> list[list[Row]]:
    """Divide rows among clients: every row goes to exactly one client, every client gets at least one.

    `iid` deals shuffled rows out evenly. `dirichlet` draws, for each label c, shares p_c ~ Dir(alpha·1) over the
    clients and gives each row of that label to a client by p_c: the smaller alpha, the fewer labels a client sees.
    A client left without a row gets one of the client that has the most.

    Args:
        rows: The rows; they keep their order within a client.
        clients: Number of clients.
        scheme: "iid" or "dirichlet".
        alpha: Concentration of the Dirichlet distribution, above 0.
        seed: The same seed gives the same division.
        label: Field that holds a row's label for `dirichlet`; by default "label" if every row carries it, else the
            answer: the completion, or the last message; of answers half as many as rows may be different.

    Returns:
        One list of rows per client.

    Raises:
        UsageError: fewer rows than clients, clients below 1, alpha not above 0, an unknown scheme, or rows without a
            label for `dirichlet`, or of answers that are free text.

    Reference:
        Hsu, Qi, Brown: "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification", arXiv 1909.06335.
    """
    if scheme not in _SCHEMES:
        raise UsageError(f"unknown partition scheme {scheme!r}. Known: {', '.join(_SCHEMES)}.")
    if clients < 1:
        raise UsageError(f"{clients} clients: give at least 1.")
    if len(rows) < clients:
        raise UsageError(f"{len(rows)} rows cannot be divided among {clients} clients: give each at least one row.")
    if not (math.isfinite(alpha) and alpha > 0):
        raise UsageError(f"alpha is {alpha}: give a finite number above 0.")
    generator = np.random.default_rng(derive_seed(seed, "partition", scheme))
    if scheme == "iid":
        order = generator.permutation(len(rows)).tolist()
        shares = [order[client::clients] for client in range(clients)]
    else:
        shares = _dirichlet(_labels(rows, label), clients, alpha, generator)
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return [[rows[index] for index in sorted(share)] for share in shares]


def _dirichlet(labels: Sequence[str], clients: int, alpha: float, generator: np.random.Generator) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for index, value in enumerate(labels):
        groups.setdefault(value, []).append(index)
    shares: list[list[int]] = [[] for _ in range(clients)]
    for value in sorted(groups):
        members = generator.permutation(groups[value])
        counts = generator.multinomial(len(members), generator.dirichlet([alpha] * clients))
        for share, part in zip(shares, np.split(members, np.cumsum(counts)[:-1]), strict=True):
            share.extend(part.tolist())
    return shares


def _labels(rows: Sequence[Row], field: str | None) -> list[str]:
    if field is None and all("label" in row for row in rows):
        field = "label"
    if field is not None:
        missing = next((number for number, row in enumerate(rows, 1) if field not in row), None)
        if missing is not None:
            raise UsageError(f"row {missing} has no field {field!r} to divide by.")
        return [json.dumps(row[field], sort_keys=True) for row in rows]
    if any("text" in row for row in rows):
        raise UsageError('rows of {"text"} have no answer to divide by: add a field "label", or use the scheme "iid".')
    answers = [str(row["messages"][-1]["content"]) if "messages" in row else row["completion"] for row in rows]
    if (different := len(set(answers))) > len(rows) / 2:
        raise UsageError(
            f"{len(rows)} rows have {different} different answers, which are no classes to divide by: add a field "
            '"label", or use scheme = "iid".'
        )
    return answers
