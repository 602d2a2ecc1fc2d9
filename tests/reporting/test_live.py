"""The page of a run that is under way, by the events of a made-up run."""

import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedproxy.artifacts import Manifest
from fedproxy.config import Federate
from fedproxy.federation.coordinator import Coordinator
from fedproxy.federation.messages import Answer, Closed, Order, Refusal, Reply, Score, Scored
from fedproxy.federation.rounds import drive
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
        ({"event": "scoring", "round": 3, "asked": NAMES}, "score round 3's adapter since 02:16:50 UTC: 0 of 2"),
        ({"event": "validated", "round": 3, "gain": {}, "best_round": None, "stop": False}, "scored by nobody."),
        ({"event": "federated", "rounds": 5, "kept": 3}, "after 5; the adapter of round 3 is kept"),
        ({"event": "resumed"}, "goes on"),
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


def lines_of(events: list[dict[str, Any]]) -> list[str]:
    """The line after each of these events."""
    now, lines = Now(), []
    for event in events:
        now.take({"time": "2026-11-29T02:16:50.1+00:00", **event})
        lines.append(now.line)
    return lines


class Scorers:
    """Clients of a federation in which round 1 is the best; the second keeps no rows back."""

    def available(self) -> list[str]:
        return NAMES

    def ask(self, orders: dict[str, Order], deadline: float | None) -> Iterator[tuple[str, Answer]]:
        yield NAMES[1], Refusal(NAMES[1], 0, "too late", "failed")  # an answer to another round, in each of them
        for name, order in orders.items():
            if not order.trains:
                yield name, Scored(name, order.round, Score(float(order.round), 4))
                continue
            scores = {"own": Score(3.0, 4)} | ({"untuned": Score(5.0, 4)} if order.untuned else {})
            update = {key: torch.ones_like(value) for key, value in order.adapter.items()}
            yield (
                name,
                Reply(name, order.round, update, 4, 1, 1, 1.0, 1.0, validation=scores if name == NAMES[0] else {}),
            )


def test_the_line_of_a_whole_federation_says_who_scores_and_that_it_ended_early(run: Path) -> None:
    """Of a real one: two rounds without a better one end it, and a resume after the first says the same again."""
    settings = Federate(rounds=9, validation=0.1, keep="best", patience_rounds=2, merge="mean", regulariser="none")

    def driven(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        events, coordinator = (
            list[dict[str, Any]](),
            Coordinator(NAMES, {"w": torch.zeros(2)}, settings, records=records),
        )

        def closed(outcome: Closed, seconds: float) -> None:
            records.append(outcome.record)
            events.append({"event": "round_closed", "round": outcome.round, "seconds": seconds})

        drive(coordinator, Scorers(), closed, on_event=lambda name, **values: events.append({"event": name, **values}))
        return [*events, {"event": "federated", "rounds": coordinator.completed, "kept": coordinator.kept}]

    events = [*BEGUN, *driven(records := [])]
    lines = lines_of(events)
    at = [number for number, event in enumerate(events) if event["event"] == "scoring"]
    assert [events[place]["round"] for place in at] == [1, 2, 3]
    for number, place in enumerate(at, 1):
        assert (
            lines[place] == f"Clients score round {number}'s adapter since 02:16:50 UTC: 0 of 1 clients have answered."
        )
        assert [line[-29:] for line in lines[place + 1 : place + 3]] == [
            "0 of 1 clients have answered.",
            "1 of 1 clients have answered.",
        ]
        assert lines[place + 3].startswith(f"Round {number} is scored")
        assert lines[place + 4].startswith(f"Round {number} is stored")
        assert [("the last" in line) for line in lines[place + 3 : place + 5]] == [number == 3] * 2
    opened = [line for event, line in zip(events, lines, strict=True) if event["event"] == "round_opened"]
    assert opened == [f"Round {n} is open since 02:16:50 UTC: 0 of 2 clients have answered." for n in (1, 2, 3)]
    assert lines[-1] == "The rounds are over after 3; the adapter of round 1 is kept."
    done = [*events, {"event": "stage_ended", "stage": "federate", "outcome": "done", "seconds": 2.0}]
    assert lines_of(done)[-1] == lines[-1]
    killed = events[: at[1] + 2]
    rest = driven(records[:1])
    again = lines_of([*killed, {"event": "resumed"}, BEGUN[1], *rest])
    assert again[len(killed) + 1] == "The rounds go on after round 1."
    assert again[len(killed) + 2 :] == lines[-len(rest) :]


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
