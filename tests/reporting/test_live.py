"""The page of a run that is under way, by the events of a made-up run."""

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest

from fedproxy.artifacts import Manifest
from fedproxy.reporting import live
from fedproxy.reporting.live import LivePage, Now, unfinished

from .sample import round_record

NAMES = ["bank", "<b>travel</b>"]
BEGUN = [{"event": "stage_started", "stage": "compress"}, {"event": "stage_started", "stage": "federate"}]


def note(run: Path, *events: dict[str, Any]) -> None:
    with open(run / "events.jsonl", "a") as file:
        file.writelines(json.dumps({"time": "2026-11-29T02:16:50.1+00:00", **event}) + "\n" for event in events)


def store_round(run: Path, number: int) -> None:
    folder = run / "rounds" / f"{number:04d}"
    folder.mkdir(parents=True)
    (folder / "round.json").write_text(json.dumps(round_record(number, NAMES, 0)))
    note(run, {"event": "round_closed", "round": number, "seconds": 1.0})


def begin(run: Path) -> Path:
    """A run whose proxy is made, before its first round."""
    (run / "proxy").mkdir(parents=True)
    (run / "experiment.toml").write_text('name = "help desk"\nseed = 3\n[federate]\nrounds = 2\n')
    sheet = {"parameters": 600, "bytes": 2400, "share": 0.6}
    Manifest("proxy", "ab" * 32, 4, [0, 2], scores=[0.1, 0.2, 0.3, 0.4], settings={"exposure": sheet}).write(
        run / "proxy"
    )
    note(run, *BEGUN)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return begin(tmp_path / "first")


def page_of(run: Path) -> str:
    return (run / "report.html").read_text()


def status_of(html: str) -> str:
    return re.search(r'<p role="status"[^>]*>(.*?)</p>', html)[1]


def test_what_is_there_of_a_run_is_what_results_json_will_hold(run: Path) -> None:
    store_round(run, 1)
    results = unfinished(run)
    assert (results.name, results.seed, results.llm.blocks, results.llm.parameters) == ("help desk", 3, 4, 1000)
    assert (results.proxy.layer_map, results.exposed, results.cost.proxy_bytes) == ([0, 2], 0.6, 2400)
    assert [each.number for each in results.rounds] == [1]
    assert results.cost.bytes_up == sum(client.bytes_up for client in results.rounds[0].clients.values())


@pytest.mark.parametrize(
    ("event", "says"),
    [
        ({"event": "waiting", "round": 1, "present": ["bank"], "needed": 2}, "Round 1 waits: 1 of 2"),
        ({"event": "round_opened", "round": 2, "asked": NAMES}, "02:16:50 UTC: 0 of 2"),
        ({"event": "round_failed", "round": 2, "reason": "no quorum"}, "no quorum"),
        ({"event": "stage_ended", "stage": "federate", "outcome": "done", "seconds": 2.0}, "federate is complete"),
        ({"event": "stage_ended", "stage": "fuse", "outcome": "failed", "error": "full"}, "fuse failed: full"),
        ({"event": "stage_ended", "stage": "fuse", "outcome": "interrupted"}, "--resume"),
        ({"event": "stage_started", "stage": "evaluate"}, "scored"),
    ],
)
def test_the_line_says_what_happens_now(event: dict[str, Any], says: str) -> None:
    now = Now()
    now.take({"time": "2026-11-29T02:16:50.1+00:00", **event})
    assert says in now.line


def test_answers_are_counted_once_a_client() -> None:
    now = Now()
    opened = {"event": "round_opened", "round": 1, "asked": NAMES, "time": "2026-11-29T02:16:50.1+00:00"}
    for event in (opened, *[{"event": "answered", "round": 1, "client": "bank", "fault": None}] * 2):
        now.take(event)
    assert "1 of 2 clients" in now.line


def test_nothing_is_written_before_it_begins(tmp_path: Path) -> None:
    page = LivePage(tmp_path / "none")
    page.close(last=True)
    assert b'role="status"' in page.content
    assert not (tmp_path / "none").exists()


def test_it_is_rendered_after_a_round_and_at_the_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(live, "REST", 0.0)
    page = LivePage(run)
    page.begin()
    page.begin()
    note(run, {"event": "round_opened", "round": 1, "asked": NAMES})
    store_round(run, 1)
    note(run, {"event": "round_opened", "round": 2, "asked": NAMES})
    until = time.monotonic() + 60
    while not (run / "report.html").is_file() or "Round 2 is open" not in status_of(page_of(run)):
        assert time.monotonic() < until
        time.sleep(0.05)
    held = page_of(run)
    assert page.content.decode() == held
    assert "Round 1 ·" in held
    assert "connect-src 'self'" in held
    assert "data-live" in held
    assert "<b>travel" not in held
    note(run, {"event": "stage_ended", "stage": "federate", "outcome": "failed", "error": "<i>no\x1b[2J quorum"})
    page.close(last=True)
    held = page_of(run)
    assert "federate failed: &lt;i&gt;no�[2J quorum" in status_of(held)
    assert "connect-src" not in held
    assert "data-live" not in held.partition("<main>")[0]


def test_it_takes_a_sixth_of_a_core_at_most(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short the rounds: between two renderings lies a pause, but what happens now is always told."""
    seen = []
    monkeypatch.setattr(live, "REST", 1e6)
    monkeypatch.setattr(
        live,
        "render",
        lambda results, **what: seen.append(results) or f"<title>x · fedproxy report</title>{what['status']}",
    )
    page = LivePage(run)
    for number in (1, 2, 3):
        store_round(run, number)
        page._look(live=True)
        assert f"Round {number} is stored" in page_of(run)
    assert [len(results.rounds) for results in seen] == [0, 1]


def test_an_error_is_logged_once_and_ends_nothing(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    page = LivePage(run)
    (run / "report.html").write_text("my own page")
    (run / "rounds" / "0001").mkdir(parents=True)
    (run / "rounds" / "0001" / "round.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            page._try(lambda: page._look(live=True))
    assert sum("0001" in message for message in caplog.messages) == 1
    (run / "rounds" / "0001" / "round.json").write_text(json.dumps(round_record(1, NAMES, 0)))
    with caplog.at_level(logging.WARNING):
        page._try(lambda: page._look(live=False))
    assert "no page of fedproxy" in caplog.messages[-1]
    assert page_of(run) == "my own page"


def test_a_line_that_a_kill_cut_short_is_passed_over(run: Path) -> None:
    with open(run / "events.jsonl", "a") as file:
        file.write('{"event": "round_op\n{"event": 3}\n[]\n{"event": "stage_started", "stage"')
    page = LivePage(run)
    page._look(live=False)
    assert status_of(page_of(run)) == "The rounds begin."
