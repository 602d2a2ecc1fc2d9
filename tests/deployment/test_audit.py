"""Nothing within the log changes unseen, no kill or full disk breaks its chain, no stranger fills the disk with it."""

import contextlib
import errno
import hashlib
import os
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedproxy.deployment.audit import LINES_A_MINUTE, Audit, check
from fedproxy.errors import ArtifactError, ResourceError, UsageError
from tests.crashes import moments


def written(path, count=5):
    with Audit(path) as log:
        for number in range(count):
            log.note("joined", f"client{number}", number=number)
    return path.read_bytes()


def head(path):
    return [event["sha256"] for event in check(path)][-1:]


def test_each_line_holds_the_hash_of_the_line_before(tmp_path):
    lines = written(tmp_path / "log").splitlines()
    events = list(check(tmp_path / "log"))
    assert [(event["event"], event["client"], event["number"]) for event in events] == [
        ("joined", f"client{number}", number) for number in range(5)
    ]
    assert [event["sha256"] for event in events] == [hashlib.sha256(line).hexdigest() for line in lines]
    assert [event["before"] for event in events] == ["0" * 64, *(event["sha256"] for event in events[:-1])]
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_done_to_a_log_is_found_or_changes_its_last_hash(tmp_path, data):
    path = tmp_path / "log"
    path.unlink(missing_ok=True)
    content = written(path)
    before, lines = head(path), content.splitlines(keepends=True)
    change = data.draw(st.sampled_from(["byte", "cut", "drop", "swap", "repeat"]))
    one, other = data.draw(st.lists(st.integers(0, len(lines) - 1), min_size=2, max_size=2, unique=True))
    if change == "byte":
        place = data.draw(st.integers(0, len(content) - 1))
        changed = content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]
    elif change == "cut":
        changed = content[: data.draw(st.integers(0, len(content) - 1))]
    elif change == "drop":
        changed = b"".join(lines[:one] + lines[one + 1 :])
    elif change == "swap":
        lines[one], lines[other] = lines[other], lines[one]
        changed = b"".join(lines)
    else:
        changed = b"".join([*lines[:one], lines[other], *lines[one:]])
    path.write_bytes(changed)
    with contextlib.suppress(ArtifactError):
        assert head(path) != before


@pytest.mark.parametrize("line", [1, 2, 3, 4])
def test_the_line_that_follows_from_nothing_is_named(tmp_path, line):
    lines = written(tmp_path / "log").splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(b"client", b"Client")
    (tmp_path / "log").write_bytes(b"".join(lines))
    events = check(tmp_path / "log")
    assert [next(events)["number"] for _ in range(line)] == list(range(line))
    with pytest.raises(ArtifactError, match=f"line {line + 1}"):
        next(events)


@pytest.mark.parametrize(
    "content", [b"{}\n", b"[1]\n", b"\n", b"\xff\n", b'{"event": 1, "before": "' + b"0" * 64 + b'"}\n']
)
def test_what_is_no_log(tmp_path, content):
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(ArtifactError, match="line 1"):
        list(check(tmp_path / "log"))
    with pytest.raises(ArtifactError, match="nothing"):
        list(check(tmp_path / "nothing"))
    (tmp_path / "log").write_bytes(b"x" * (1 << 20))
    with pytest.raises(ArtifactError, match="log"):
        Audit(tmp_path / "log")
    assert (tmp_path / "log").stat().st_size == 1 << 20
    with pytest.raises(UsageError, match="nowhere"):
        Audit(tmp_path / "nowhere" / "log")


@pytest.mark.parametrize("kept", [0, 1, 20, -1])
def test_a_log_goes_on_below_its_last_whole_line(tmp_path, kept):
    whole = written(tmp_path / "log")
    last = whole.splitlines(keepends=True)[-1]
    (tmp_path / "log").write_bytes(whole + last[:kept])
    assert written(tmp_path / "log").startswith(whole)
    assert len(list(check(tmp_path / "log"))) == 10


def test_whatever_a_kill_leaves_is_a_log_that_goes_on(tmp_path):
    (tmp_path / "run").mkdir()
    states = moments(lambda: written(tmp_path / "run" / "log", 3), tmp_path / "run", tmp_path / "kept")
    assert len(states) > 4
    for state in states:
        if (state / "log").exists():
            whole = (state / "log").read_bytes().count(b"\n")
            written(state / "log", 2)
            assert len(list(check(state / "log"))) == whole + 2


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_told_and_leaves_the_log_as_it_was(tmp_path, monkeypatch, call):
    def half(file, content):
        return write(file, content[: len(content) // 2])

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write, before = os.write, written(tmp_path / "log")
    with Audit(tmp_path / "log") as log:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, {"write": half, "fsync": full}[call])
            with pytest.raises(ResourceError, match="log"):
                log.note("joined", "bank")
        assert (tmp_path / "log").read_bytes() == before
        log.note("joined", "shop")
    assert [event["client"] for event in check(tmp_path / "log")][5:] == ["shop"]


def test_strangers_share_a_minutes_lines_and_members_have_their_own(tmp_path):
    now = [0.0]
    log = Audit(tmp_path / "log", lambda: now[0])
    for number in range(10_000):
        log.note("refused", reason=f"no {number}")
    log.note("refused", "bank", reason="another process")
    log.note("joined", "bank")
    now[0] = 59.0
    log.flush()
    assert len(list(check(tmp_path / "log"))) == LINES_A_MINUTE + 2
    now[0] = 60.0
    log.note("refused", reason="later")
    log.close()
    events = [
        {key: event.get(key) for key in ("event", "client", "reason", "more")} for event in check(tmp_path / "log")
    ]
    assert [event["reason"] for event in events[:LINES_A_MINUTE]] == [
        f"no {number}" for number in range(LINES_A_MINUTE)
    ]
    assert [event["more"] for event in events if event["more"]] == [10_000 - LINES_A_MINUTE]
    assert events[-1] == {"event": "refused", "client": None, "reason": "later", "more": None}


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["", "bank"]), st.floats(0, 40)), max_size=120))
def test_every_note_is_a_line_or_counted_in_one(tmp_path, steps):
    now = [0.0]
    (tmp_path / "log").unlink(missing_ok=True)
    with Audit(tmp_path / "log", lambda: now[0]) as log:
        for event, client, pause in steps:
            now[0] += pause
            log.note(event, client)
    events = list(check(tmp_path / "log"))
    for event in "ab":
        for client in ("", "bank"):
            found = [e.get("more", 1) for e in events if (e["event"], e.get("client", "")) == (event, client)]
            assert sum(found) == sum((e, c) == (event, client) for e, c, _ in steps)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_foreign_text_is_plain_and_short(tmp_path, text):
    (tmp_path / "log").unlink(missing_ok=True)
    with Audit(tmp_path / "log") as log:
        log.note("refused", reason=text * 100)
    assert (tmp_path / "log").stat().st_size < 5000
    (event,) = check(tmp_path / "log")
    assert event["reason"].isprintable()
    assert len(event["reason"]) <= 300


def test_threads_write_whole_lines(tmp_path):
    with Audit(tmp_path / "log") as log:
        threads = [
            threading.Thread(target=lambda i=i: [log.note("joined", f"c{i}", n=n) for n in range(LINES_A_MINUTE)])
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = sorted((event["client"], event["n"]) for event in check(tmp_path / "log"))
    assert found == sorted((f"c{i}", n) for i in range(8) for n in range(LINES_A_MINUTE))


def test_it_is_for_its_owner_alone(tmp_path):
    written(tmp_path / "log")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
