"""What the owner sees of the rounds: read from the run's log while another process writes it."""

import io
import json
from pathlib import Path

import pytest

from fedproxy.cli import rounds_table as table_module
from fedproxy.cli.output import Terminal
from fedproxy.cli.rounds_table import Rounds, rounds_table
from fedproxy.events import Events

STORED = [{"event": "round_closed", "round": number, "seconds": 1.0} for number in (1, 2, 3)]


def lines(*events: dict[str, object]) -> str:
    return "".join(json.dumps({"time": "2026-01-01T00:00:00+00:00", **event}) + "\n" for event in events)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "_LOOK_SECONDS", 0.0)


def test_an_overwritten_log_is_read_from_its_first_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "events.jsonl"
    log.write_text(lines(*STORED[:2]) + "x" * 10)  # the old run's: it ends in the middle of a line of the new one's
    with rounds_table(tmp_path, resume=False) as update:
        log.unlink()
        log.write_text(lines(*STORED))
        update()
    assert capsys.readouterr().err.splitlines() == [f"Round {number} is stored, 1.0 s." for number in (1, 2, 3)]


def test_a_resumed_log_is_read_from_where_it_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "events.jsonl"
    log.write_text(lines(*STORED[:2]))
    with rounds_table(tmp_path, resume=True) as update, open(log, "a") as file:
        file.write(lines(STORED[2]))
        file.flush()
        update()
    assert capsys.readouterr().err == "Round 3 is stored, 1.0 s.\n"


@pytest.mark.parametrize("torn", ['{"event": "round_cl{"event": "stage_ended"}\n', "[1]\n", "3.2}\n", "\xff\n", "{}\n"])
def test_a_line_that_is_no_event_is_skipped(tmp_path: Path, torn: str) -> None:
    log = tmp_path / "events.jsonl"
    log.write_bytes(torn.encode("latin-1") + lines(STORED[0]).encode())
    assert Rounds(Events(log.parent)).read() == ["Round 1 is stored, 1.0 s."]


def test_a_line_is_awaited_until_it_is_whole(tmp_path: Path) -> None:
    log, whole = tmp_path / "events.jsonl", lines(STORED[0])
    log.write_text(whole[:20])
    rounds = Rounds(Events(log.parent))
    assert rounds.read() == []
    log.write_text(whole)
    assert rounds.read() == ["Round 1 is stored, 1.0 s."]


@pytest.mark.parametrize("terminal", [False, True])
def test_beside_bars_of_progress_a_file_gets_a_line_for_what_is_done_and_a_terminal_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    heard = io.StringIO()
    target = Terminal(file=heard, force_terminal=terminal, color_system=None, width=120)
    monkeypatch.setattr(table_module, "console", lambda: target)
    monkeypatch.setattr("fedproxy.cli.output.console", lambda: target)
    found: list[dict[str, object]] = [
        {"event": "round_opened", "round": 1, "asked": ["bank"]},
        {"event": "answered", "round": 1, "client": "bank", "fault": ""},
        {"event": "validated", "round": 1, "global": {"loss": {"by_rows": 0.5}}, "best_round": 1, "stop": False},
        {"event": "round_closed", "round": 1, "seconds": 1.0},
        {"event": "validated", "round": 2, "best_round": 1, "stop": False},
        {"event": "round_closed", "round": 2, "seconds": 1.0},
        {"event": "round_closed", "round": 3, "seconds": 1.0},
    ]
    with rounds_table(tmp_path, resume=False, bars=True) as update:
        (tmp_path / "events.jsonl").write_text(lines(*found))
        update()
    told = [
        "Round 1: bank has trained.",
        "Round 1 is stored, 1.0 s. Validation loss 0.500; the best so far is round 1.",
        "Round 2 is stored, 1.0 s. No client scored it.",
        "Round 3 is stored, 1.0 s.",
    ]
    assert heard.getvalue().splitlines() == ([] if terminal else told)


HOSTILE = "[/x] [bold]\x1b[2J\x9b31m\u202e:smile: \r\x07"


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_client_says_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """A refusal steers no terminal, and its brackets are no markup, in lines and in the table."""
    heard = io.StringIO()
    target = Terminal(file=heard, force_terminal=terminal, color_system=None, width=120)
    monkeypatch.setattr(table_module, "console", lambda: target)
    monkeypatch.setattr("fedproxy.cli.output.console", lambda: target)
    with rounds_table(tmp_path, resume=False) as update:
        asked: dict[str, object] = {"event": "round_opened", "round": 1, "asked": ["bank"]}
        answered: dict[str, object] = {"event": "answered", "round": 1, "client": "bank", "fault": HOSTILE}
        (tmp_path / "events.jsonl").write_text(lines(asked, answered))
        update()
        if terminal:
            target.print(rounds_of(tmp_path).table())
    said = heard.getvalue()
    assert "[/x] [bold]�[2J�31m�:smile:  �" in said
    assert not {"\x9b", "\u202e", "\x07"} & set(said)
    assert "\x1b[2J" not in said


def rounds_of(folder: Path) -> Rounds:
    rounds = Rounds(Events(folder))
    rounds.read()
    return rounds
