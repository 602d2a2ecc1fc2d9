"""Data folders whose scored split holds training rows, so that settings are chosen without a look at test rows.

    python scripts/validation_rows.py ../shared/data runs/validation sst2 ag_news trec banking77 clinc150

Of every eight training rows the last is scored, the others train. The new folders hold the same file names as the old ones.
"""

import sys
from pathlib import Path

SCORED = ("test", "validation")
EVERY = 8


def split(source: Path, out: Path) -> None:
    """Writes one data set's two files to `out`.

    Raises:
        FileNotFoundError: `source` lacks train.jsonl, or both of the splits that a task may score.
    """
    scored = next((name for name in SCORED if (source / f"{name}.jsonl").is_file()), None)
    if scored is None:
        raise FileNotFoundError(f"{source} has neither of {', '.join(SCORED)}")
    with (source / "train.jsonl").open(encoding="utf-8", newline="\n") as file:
        rows = list(file)
    out.mkdir(parents=True)
    kept = [row for number, row in enumerate(rows) if number % EVERY != EVERY - 1]
    (out / "train.jsonl").write_text("".join(kept), encoding="utf-8")
    (out / f"{scored}.jsonl").write_text("".join(rows[EVERY - 1 :: EVERY]), encoding="utf-8")


if __name__ == "__main__":
    data, target, *names = sys.argv[1:]
    for name in names:
        split(Path(data) / name, Path(target) / name)
