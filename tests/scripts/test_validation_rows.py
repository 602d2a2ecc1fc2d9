"""The folder that settings are chosen on: what is scored there trains nothing, and is no test row."""

import runpy
from pathlib import Path

import pytest

from fedproxy.errors import ArtifactError, UsageError

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "validation_rows.py"))
split, main = SCRIPT["split"], SCRIPT["main"]


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
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        split(tmp_path, tmp_path / "out")


def test_what_was_complete_stays_and_a_half_does_not_appear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "data" / "whole"
    whole.mkdir(parents=True)
    for name in ("train", "test"):
        (whole / f"{name}.jsonl").write_text("{}\n" * 8)
    data, out = str(tmp_path / "data"), tmp_path / "out"
    assert main([data, str(out), "whole", "missing"]) == ArtifactError.exit_code
    assert "missing" in capsys.readouterr().err
    assert not out.exists()
    assert main([data, str(out), "whole"]) == 0
    assert main([data, str(out), "whole"]) == UsageError.exit_code
    assert (out / "whole" / "test.jsonl").read_text() == "{}\n"
