"""Whatever leaves is in the ledger before it does, under its hash; who damages it is found out."""

import base64
import hashlib
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedproxy.deployment import ledger as ledger_module
from fedproxy.deployment.chain import Chain, read
from fedproxy.deployment.ledger import LINE_BYTES, SUPERNODE, Ledger, check
from fedproxy.errors import ArtifactError, UsageError

KINDS = {
    "POST /fedproxy/welcome": "introduction",
    "POST /fedproxy/farewell": "farewell",
    "GET /listing": "hand-out",
    "GET /result": "hand-out",
    f"GET /parts/{'0' * 64}": "hand-out",
    "CONNECT example.org:9443": "proxy",
    "POST /v1/fleet/push-object": "answer",
    "POST /v1/fleet/pull-messages": "order",
    "POST /v1/fleet/send-node-heartbeat": "heartbeat",
    "POST /v1/fleet/activate-node": "connection",
    "PUT /elsewhere": "other",
}


@pytest.mark.parametrize("line", KINDS)
def test_a_request_is_noted_by_its_kind(tmp_path, line):
    one = Ledger(tmp_path / "ledger", "example.org:9443")
    request = f"{line} HTTP/1.1\r\nA: b\r\n\r\nbody".encode()
    one.leaves(request)
    ((record, _),) = check(tmp_path / "ledger")
    assert (record["event"], record["request"], record["to"]) == (KINDS[line], line, "example.org:9443")
    assert (record["bytes"], record["sha256"]) == (len(request), hashlib.sha256(request).hexdigest())
    assert (tmp_path / "ledger").stat().st_mode & 0o777 == 0o600
    one.close()
    with pytest.raises(UsageError):
        one.leaves(request)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.binary(min_size=1, max_size=50), max_size=8), full=st.booleans())
def test_the_pieces_of_a_ledger_are_what_left_in_its_order(tmp_path, contents, full):
    path = tmp_path / "ledger"
    path.unlink(missing_ok=True)
    ledger_module.PIECE_BYTES, whole = 7, ledger_module.PIECE_BYTES
    try:
        one = Ledger(path, "h:1", full=full)
        for content in contents:
            one.hands("update", content) if len(content) % 2 else one.leaves(content)
        one.close()
    finally:
        ledger_module.PIECE_BYTES = whole
    records = [record for record, _ in check(path)]
    assert sum(record["bytes"] for record in records) == sum(map(len, contents))
    assert {record["to"] for record in records} <= {"h:1", SUPERNODE}
    assert all(("payload" in record) == full for record in records)
    if full:
        assert b"".join(base64.b64decode(record["payload"]) for record in records) == b"".join(contents)


def test_several_processes_share_a_ledger(tmp_path):
    ledgers = [Ledger(tmp_path / "ledger", f"h:{number}") for number in range(4)]
    threads = [
        threading.Thread(target=lambda one=one: [one.leaves(b"GET /listing HTTP/1.1\r\n\r\n") for _ in range(20)])
        for one in ledgers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record["to"] for record, _ in check(tmp_path / "ledger")) == sorted(
        f"h:{number}" for number in range(4) for _ in range(20)
    )


def test_a_line_that_another_process_did_not_end_is_cut_off(tmp_path):
    one = Ledger(tmp_path / "ledger", "h:1")
    one.hands("update", b"1")
    with open(tmp_path / "ledger", "ab") as file:
        file.write(b'{"time": "')
    one.hands("update", b"2")
    assert [record["bytes"] for record, _ in check(tmp_path / "ledger")] == [1, 1]


LINE = {"time": "t", "event": "update", "to": "h:1", "bytes": 1, "sha256": hashlib.sha256(b"1").hexdigest()}


@pytest.mark.parametrize(
    "change",
    [
        *({"payload": base64.b64encode(b"2").decode()}, {"payload": 7}, {"payload": "%"}),
        *({"bytes": "1"}, {"to": None}, {"request": 3}, {"sha256": 0}),
    ],
)
def test_a_line_that_is_none_of_a_ledger_is_named(tmp_path, change):
    log = Chain(tmp_path / "ledger")
    for record in (LINE, {**LINE, **change}):
        log.append(record)
    lines = check(tmp_path / "ledger")
    assert next(lines)[0]["bytes"] == 1
    with pytest.raises(ArtifactError, match="line 2"):
        next(lines)


def test_foreign_text_in_a_ledger_steers_no_terminal(tmp_path):
    Chain(tmp_path / "ledger").append({**LINE, "to": "\x1b[2J", "request": "\x1b"})
    ((record, _),) = check(tmp_path / "ledger")
    assert "\x1b" not in record["to"] + record["request"]


def test_the_longest_line_is_read(tmp_path):
    one = Ledger(tmp_path / "ledger", "h:1", full=True)
    one.hands("update", bytes(3 << 20))
    assert [record["bytes"] for record, _ in check(tmp_path / "ledger")] == [1 << 20] * 3
    assert max(map(len, (tmp_path / "ledger").read_bytes().splitlines())) < LINE_BYTES
    assert len(list(read(tmp_path / "ledger", LINE_BYTES))) == 3
