"""Data folders whose scored split holds training rows, so that settings are chosen without a look at test rows.

    python scripts/validation_rows.py ../shared/data runs/validation sst2 ag_news trec banking77 clinc150

Of every eight training rows the last is scored, the others train. The new folders hold the same file names as the old ones.
OUT appears only when all of them are complete.
"""

import argparse
import sys
from pathlib import Path

from fedproxy.artifacts import new_directory
from fedproxy.errors import ArtifactError, FedproxyError

SCORED = ("test", "validation")
EVERY = 8


def split(source: Path, out: Path) -> None:
    """Write one data set's two files to `out`.

    Raises:
        ArtifactError: `source` lacks train.jsonl, or both of the splits that a task may score.
    """
    scored = next((name for name in SCORED if (source / f"{name}.jsonl").is_file()), None)
    if scored is None or not (source / "train.jsonl").is_file():
        raise ArtifactError(f"{source} needs train.jsonl, and one of {', '.join(SCORED)}.")
    with (source / "train.jsonl").open("rb") as file:
        rows = list(file)
    out.mkdir()
    kept = [row for number, row in enumerate(rows) if number % EVERY != EVERY - 1]
    (out / "train.jsonl").write_bytes(b"".join(kept))
    (out / f"{scored}.jsonl").write_bytes(b"".join(rows[EVERY - 1 :: EVERY]))


def main(arguments: list[str] | None = None) -> int:
    """Split what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME")
    given = parser.parse_args(arguments)
    try:
        with new_directory(given.out) as folder:
            for name in dict.fromkeys(given.names):
                split(given.data / name, folder / name)
    except FedproxyError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
