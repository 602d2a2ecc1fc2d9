import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedproxy.cli import main, sheets
from fedproxy.cli.sheets import show_plan, show_sheet
from fedproxy.compression.plan import Option, Plan
from fedproxy.compression.scores import SCORES
from fedproxy.config import Train

Checkpoint = Callable[..., Path]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, captured.out, captured.err

    return call


def printed(show: Callable[[Console, Any], None], value: object) -> str:
    target = Console(file=io.StringIO(), width=120)
    show(target, value)
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def test_help_names_every_score(cli: Cli) -> None:
    words = " ".join(cli("compress", "--help")[1].replace("│", " ").split()).replace("- ", "-")
    assert all(name in words for name in SCORES)
    without = sorted(name for name, row in SCORES.items() if not row.reads_text)
    assert f"The scores {', '.join(without[:-1])} and {without[-1]} do without" in words


def test_a_score_that_reads_text_needs_text(cli: Cli, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    for more in ([], ["--dry-run"]):
        code, _, err = cli("compress", tiny_checkpoint(), tmp_path / "out", *more)
        assert code == 2
        assert "block-influence" in err
        assert "calibration" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--score", "best"], ["--placement", "cloud"], ["--heal-mode", "half"]])
def test_unknown_names_are_code_2(cli: Cli, tiny_checkpoint: Checkpoint, tmp_path: Path, option: list[str]) -> None:
    code, _, err = cli("compress", tiny_checkpoint(), tmp_path / "out", "--score", "uniform", *option)
    assert code == 2
    assert option[1] in err


def test_dry_run_shows_and_writes_nothing(
    cli: Cli, tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
) -> None:
    llm = tiny_checkpoint()
    code, out, err = cli("compress", llm, tmp_path / "out", "--calibration", calibration, "--remove", 0.4, "--dry-run")
    assert (code, out) == (0, "")
    bars = [line for line in err.splitlines() if line.startswith("block ")]
    assert len(bars) == 6
    assert [line.split()[-1] for line in bars].count("removed") == 2
    assert all(("░" in line) == line.endswith("removed") and ("█" in line) == line.endswith("kept") for line in bars)
    assert "0.4 ◀" in err
    assert "Nothing was written" in err
    assert "is run in memory (" in err
    assert list(tmp_path.iterdir()) == []


def test_dry_run_as_json(cli: Cli, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    code, out, _ = cli("compress", tiny_checkpoint(), tmp_path / "out", "--score", "magnitude", "--dry-run", "--json")
    assert code == 0
    found = json.loads(out)
    assert found.keys() == {"score", "scores", "remove", "options", "train", "parameters", "bytes"}
    assert [option["remove"] for option in found["options"]] == [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert found["options"][4].keys() == {"remove", "keep", "parameters", "bytes", "cpu_memory", "gpu_memory"}
    assert list(tmp_path.iterdir()) == []


def test_the_sheet_is_shown_before_anything_is_written(
    cli: Cli, tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[bool] = []

    def show(sheet: dict[str, Any]) -> None:
        there.append(any(tmp_path.iterdir()))
        sheets.print_sheet(sheet)

    monkeypatch.setattr("fedproxy.cli.compress.print_sheet", show)
    code, out, err = cli("compress", tiny_checkpoint(), tmp_path / "out", "--calibration", calibration, "--json")
    assert (code, there) == (0, [False])
    found = json.loads(out)
    assert found["exposure"] == json.loads((tmp_path / "out" / "fedproxy.json").read_text())["settings"]["exposure"]
    assert found["exposure"]["perplexity"]["proxy"] > 1
    assert "Exposure sheet" in err
    assert "Perplexity on public text (" in err


def test_without_public_text_perplexity_is_not_measured(cli: Cli, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    llm = tiny_checkpoint()
    code, _, err = cli("compress", llm, tmp_path / "out", "--score", "uniform", "--placement", "stream")
    assert code == 0
    assert "not measured" in err
    assert "one block at a time" in " ".join(err.split())
    assert "keeps 3 of 6 blocks [0, 2, 5]" in err


@pytest.mark.parametrize("options", [["--heal-refit", "4"], ["--heal-steps", "2"], []])
def test_what_healing_made_of_the_proxy_is_told(
    cli: Cli, tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path, options: list[str]
) -> None:
    text = ["--calibration", calibration, "--max-length", 24, *options]
    code, out, _ = cli("compress", tiny_checkpoint(), tmp_path / "out", *text, "--json")
    assert code == 0
    healed = json.loads(out)["healed"]
    if not options:
        assert healed is None
        return
    assert set(healed) == {"llm", "before", "after"}
    _, _, said = cli("compress", tiny_checkpoint(), tmp_path / "out", *text, "--overwrite")
    assert all(f"{value:.4g}" in said for value in healed.values())


def test_sheet_by_hand() -> None:
    def row(group: str, tensors: int, parameters: int, count: int) -> dict[str, Any]:
        return {"group": group, "tensors": tensors, "parameters": parameters, "bytes": count}

    sheet = {
        "leaves": [row("embeddings", 1, 10, 20), row("block 0", 2, 30, 60), row("block 3", 2, 30, 60)],
        "stays": [row("block 1", 2, 30, 60), row("block 2", 2, 30, 60)],
        **row("", 5, 70, 140),
        "share": 70 / 130,
        "healed": True,
        "perplexity": {"llm": 5.0, "proxy": 7.25, "tokens": 1234},
    }
    lines = [" ".join(line.split()) for line in printed(show_sheet, sheet).splitlines()]
    assert "2 blocks: 0, 3 4 60 120 B" in lines
    assert "all (53.8% of the LLM's parameters) 5 70 140 B" in lines
    assert "stays: 2 blocks: 1, 2 4 60 120 B" in lines
    assert "Perplexity on public text (1,234 tokens): LLM 5, proxy 7.25 before it is healed." in lines
    assert "fedproxy audit RUN --attack llm-from-proxy" in " ".join(lines)
    text = printed(show_sheet, {**sheet, "healed": False, "perplexity": None})
    assert "not healed" in text
    assert "not measured" in text


def test_plan_by_hand() -> None:
    options = [Option(0.2, [0, 1, 2, 4], 40, 80, 5_000_000, 3_000), Option(0.6, [0, 2], 20, 40, 2_000_000, 1_000)]
    text = printed(show_plan, Plan("perplexity", [2.0, -1.0, 0.5, 0.0, 0.8], 0.6, options, Train(), 50, 100))
    bars = [line.split() for line in text.splitlines() if line.startswith("block")]
    assert [bar[2] for bar in bars] == ["█" * 40, "░", "█" * 20, "░" * 13, "░" * 24]
    assert [bar[-1] for bar in bars] == ["kept", "removed", "kept", "removed", "removed"]
    assert "4: 0-2, 4" in text
    assert "0.6 ◀" in text
    assert "5.0 MB" in text


def test_equal_scores_have_equal_bars() -> None:
    option = Option(0.0, [0, 1], 1, 1, 1, 1)
    text = printed(show_plan, Plan("uniform", [0.0, 0.0], 0.0, [option], Train(), 1, 1))
    assert [line.split()[2] for line in text.splitlines() if line.startswith("block")] == ["█", "█"]
