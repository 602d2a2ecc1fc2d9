"""The folder that settings are chosen on: what is scored there trains nothing, and is no test row."""

import runpy
from pathlib import Path

import pytest

split = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "validation_rows.py"))["split"]


@pytest.mark.parametrize("scored", ["test", "validation"])
def test_each_training_row_trains_or_is_scored(tmp_path: Path, scored: str) -> None:
    rows = [f'{{"text": "row\u2028{number}"}}\n' for number in range(20)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    (tmp_path / "data" / f"{scored}.jsonl").write_text('{"text": "a test row"}\n', encoding="utf-8")
    split(tmp_path / "data", tmp_path / "out")
    left, kept = ((tmp_path / "out" / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("train", scored))
    assert kept == rows[7] + rows[15]
    assert left == "".join(row for row in rows if row not in kept)


def test_a_set_without_a_scored_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        split(tmp_path, tmp_path / "out")
