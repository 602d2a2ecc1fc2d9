import base64
import json
from dataclasses import asdict, replace
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from fedproxy.deployment import welcome
from fedproxy.deployment.certificates import make_key
from fedproxy.deployment.welcome import StrangerError, Verdict, Welcome, check_introduction, introduce, public_pem
from fedproxy.errors import ArtifactError
from fedproxy.federation.wire import ENCODINGS
from tests.federation.test_offer import OFFER

KEY = make_key()
WELCOME = Welcome("bank", "token", OFFER, Verdict(3, "its norm"), "0" * 64, 1.5)


def test_an_introduction_comes_back_as_made():
    said = introduce(KEY, "bank")
    assert check_introduction(said.encode()) == said
    assert (said.public_key, said.name) == (public_pem(KEY.public_key()), "bank")
    assert said.spoken == ENCODINGS.keys()
    assert introduce(KEY, wires=("bf16", "fp32")).spoken == {"bf16", "fp32"}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "shop"},
        {"wires": "fp32"},
        {"process": "1" * 16},
        {"time": 1e9},
        {"public_key": public_pem(make_key().public_key())},
    ],
)
def test_nothing_of_it_can_be_changed(change):
    with pytest.raises(StrangerError, match="signed with another key"):
        check_introduction(replace(introduce(KEY, "bank"), **change).encode())


def at(monkeypatch, seconds):
    monkeypatch.setattr(welcome.time, "time", lambda: seconds)


@pytest.mark.parametrize("age", [-1e6, -4.1, 300.1, 1e6])
def test_clocks_that_differ_by_more_than_flower_takes_are_refused(monkeypatch, age):
    at(monkeypatch, 1.8e9)
    said = introduce(KEY).encode()
    at(monkeypatch, 1.8e9 + age)
    with pytest.raises(StrangerError) as refused:
        check_introduction(said)
    for clock in (1.8e9, 1.8e9 + age):
        assert datetime.fromtimestamp(clock, UTC).strftime("%Y-%m-%d %H:%M:%S") in str(refused.value)


@pytest.mark.parametrize("age", [-3.9, 0.0, 299.9])
def test_clocks_that_differ_by_less_are_taken(monkeypatch, age):
    at(monkeypatch, 1.8e9)
    said = introduce(KEY)
    at(monkeypatch, 1.8e9 + age)
    assert check_introduction(said.encode()) == said


@pytest.mark.slow
@pytest.mark.parametrize("age", [-4.0, 300.0])
def test_flower_takes_clocks_that_the_welcome_takes(age):
    from flwr.common import constant

    assert -constant.SYSTEM_TIME_TOLERANCE < age < constant.TIMESTAMP_TOLERANCE + constant.SYSTEM_TIME_TOLERANCE


@pytest.mark.parametrize("time", [-1.0, 1e12, 1e300])
def test_a_time_that_no_clock_shows_is_refused(monkeypatch, time):
    at(monkeypatch, time)
    with pytest.raises(StrangerError):
        check_introduction(introduce(KEY).encode())


@pytest.mark.parametrize(
    ("asked", "answered", "ahead"),
    [(100.0, 101.0, 0.0), (99.0, 100.0, 0.0), (103.0, 105.0, 3.0), (90.0, 93.0, -7.0), (90.0, 110.0, 0.0)],
)
def test_how_far_a_clock_is_ahead_is_what_the_way_there_and_back_does_not_explain(asked, answered, ahead):
    assert replace(WELCOME, time=100.0).ahead(asked, answered) == ahead


def ed25519_pem():
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    kind = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(*kind).decode()


def unknown_curve_pem():
    kind = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    der = KEY.public_key().public_bytes(*kind)
    other = der.replace(bytes.fromhex("06052b81040022"), bytes.fromhex("06052b8104007f"))
    assert other != der
    return f"-----BEGIN PUBLIC KEY-----\n{base64.b64encode(other).decode()}\n-----END PUBLIC KEY-----\n"


@pytest.mark.parametrize("time", ["0", None, [0], True, {}])
def test_a_time_that_is_none_is_refused_also_if_it_is_signed(monkeypatch, time):
    monkeypatch.setattr(welcome.time, "time", lambda: time)
    said = introduce(KEY).encode()
    monkeypatch.undo()
    with pytest.raises(StrangerError):
        check_introduction(said)


GOOD = asdict(introduce(KEY))


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 10_000,
        b'{"time": NaN}',
        *(
            json.dumps(values).encode()
            for values in (
                {},
                {**GOOD, "more": 1},
                {**GOOD, "name": 1},
                {**GOOD, "wires": ["fp32"]},
                {key: value for key, value in GOOD.items() if key != "wires"},
                {**GOOD, "process": 1},
                {**GOOD, "process": "0" * 1000},
                {**GOOD, "time": "0"},
                {**GOOD, "time": [0]},
                {**GOOD, "public_key": "-----BEGIN"},
                {**GOOD, "public_key": GOOD["public_key"] + "\n"},
                {**GOOD, "public_key": ed25519_pem()},
                {**GOOD, "public_key": unknown_curve_pem()},
                {**GOOD, "signature": "é"},
                {**GOOD, "signature": ""},
                {**GOOD, "signature": base64.b64encode(b"0" * 100).decode()},
            )
        ),
    ],
)
def test_what_is_no_introduction_is_refused(said):
    with pytest.raises(StrangerError):
        check_introduction(said)


def test_a_welcome_comes_back_as_made_and_names_no_path():
    assert Welcome.decode(WELCOME.encode()) == WELCOME
    assert Welcome.decode(WELCOME.encode()).time == WELCOME.time
    assert b"secret" not in WELCOME.encode()


WRONG_VERDICTS = [
    1,
    [],
    {},
    {"round": "1", "reason": ""},
    {"round": 0, "reason": ""},
    {"round": 1 << 60, "reason": ""},
    {"round": True, "reason": None},
]


def changed(**values):
    return json.dumps({**json.loads(WELCOME.encode()), **values}).encode()


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "cannot be read"),
        (changed(more=1), "cannot be read"),
        (changed(name=1), "cannot be read"),
        (changed(name="../x"), "calls this client '../x'"),
        (changed(time="0"), "cannot be read"),
        (changed(offer="{}"), "protocol"),
        (changed(result="x"), "result 'x'"),
        (changed(result=None), "cannot be read"),
        *((changed(verdict=verdict), "last round") for verdict in WRONG_VERDICTS),
    ],
)
def test_what_is_no_welcome_is_refused(said, says):
    with pytest.raises(ArtifactError, match=says):
        Welcome.decode(said)
