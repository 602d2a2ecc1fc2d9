import dataclasses
import inspect
import re

import pytest

from fedproxy.cli import main
from fedproxy.cli.join import join as command
from fedproxy.config import Client, seconds
from fedproxy.deployment import joining as joining_module
from fedproxy.deployment.address import Address
from fedproxy.deployment.joining import Joining, Owner, join, look
from fedproxy.deployment.keys import add_client, client_key_file, init_keys
from fedproxy.deployment.ledger import check
from fedproxy.deployment.welcome import Verdict, Welcome
from fedproxy.errors import FederationError, UsageError
from fedproxy.federation.offer import Limits
from tests.deployment.test_gateway import proxy, start, superlink  # noqa: F401
from tests.federation.test_offer import OFFER


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def test_a_server_that_goes_and_comes_back_is_told_once_each_way(start, caplog):  # noqa: F811
    hub = start(registered=False)
    owner = Owner(Joining(Address("127.0.0.1", hub.gateway.port), None, name="bank"))
    welcome = owner.ask()
    assert owner.last_word(welcome) is None
    hub.gateway.close()
    owner._link.close()  # what the server's end does to a connection
    for _ in range(3):
        assert owner.last_word(welcome) is None
    start(registered=False, port=hub.gateway.port)
    caplog.set_level("INFO", "fedproxy")
    for _ in range(3):
        assert owner.last_word(welcome) is None
    owner.close()
    where = f"127.0.0.1:{hub.gateway.port}"
    told = [record.getMessage() for record in caplog.records if record.name == "fedproxy.deployment.joining"]
    assert told == [f"{where} is away. It is waited for, up to 600 s.", f"{where} is back."]


def test_a_connection_that_the_server_closed_in_a_long_round_is_not_told(start, caplog):  # noqa: F811
    hub = start(registered=False)
    owner = Owner(Joining(Address("127.0.0.1", hub.gateway.port), None, name="bank"))
    welcome = owner.ask()
    for connection in list(hub.gateway._server._deadlines):
        hub.gateway._server._deadlines[connection] = 0.0  # as after 30 seconds of silence
    hub.gateway._server.service_actions()
    assert owner.last_word(welcome) is None
    owner.close()
    assert not [record for record in caplog.records if record.name == "fedproxy.deployment.joining"]


def test_a_client_is_told_once_whether_its_update_counted_and_at_the_end_as_well(start):  # noqa: F811
    verdicts, told = {}, []
    hub = start(registered=False, verdicts=verdicts)
    owner = Owner(Joining(Address("127.0.0.1", hub.gateway.port), None, name="bank"), told.append)
    welcome = owner.ask()
    assert (owner.last_word(welcome), told) == (None, [])
    verdicts |= {"bank": Verdict(1), "shop": Verdict(1, "norm")}
    assert owner.last_word(welcome) is None
    assert owner.last_word(welcome) is None
    assert told == [Verdict(1)]
    verdicts["bank"] = Verdict(2, "its norm \x1b[2J is 9")
    assert owner.last_word(welcome) is None
    verdicts["bank"] = Verdict(3)
    hub.gateway.end("complete")
    assert owner.last_word(welcome) == welcome
    owner.close()
    assert [(verdict.round, bool(verdict.reason)) for verdict in told] == [(1, False), (2, True), (3, False)]
    assert "\x1b" not in told[1].reason


@pytest.mark.parametrize(("ahead", "told"), [(0.0, ""), (2.9, ""), (3.5, "3.5"), (-2.9, ""), (-290.0, "290")])
def test_a_clock_that_differs_is_told(caplog, monkeypatch, ahead, told):
    now = 1.8e9
    answered = Welcome("bank", "token", OFFER, time=now).encode()
    monkeypatch.setattr(Owner, "_introduce", lambda owner: (200, answered))
    monkeypatch.setattr(joining_module.time, "time", lambda: now + ahead)
    Owner(Joining(Address("127.0.0.1", 1), None, name="bank")).ask()
    found = [re.findall(r"[\d.]+(?= s )", record.getMessage()) for record in caplog.records]
    assert [seconds for seconds in found if seconds] == ([[told]] if told else [])


def test_a_look_tells_the_offer(start):  # noqa: F811
    hub = start(registered=False)
    joining = Joining(Address("127.0.0.1", hub.gateway.port), None, name="bank")
    assert look(joining).offer == hub.gateway._offer("bank", frozenset(joining.wires))


def test_a_look_shows_all_that_is_asked_and_leaves_a_line_of_what_it_told(start, monkeypatch, tmp_path, capsys):  # noqa: F811
    hub = start(registered=False)
    offer = hub.gateway._offer("bank", frozenset(Joining(None, None).wires))
    monkeypatch.setenv("COLUMNS", "5000")
    arguments = ["join", f"127.0.0.1:{hub.gateway.port}", "--insecure", "--name", "bank", "--look"]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--cache", str(tmp_path / "cache")])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().err.split())
    (left,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    ((line, _),) = check(left)
    assert (line["event"], line["to"]) == ("introduction", f"127.0.0.1:{hub.gateway.port}")
    assert str(left) in said
    assert offer.sha256 in said
    for table in (offer, offer.train):
        for key, value in dataclasses.asdict(table).items():
            if key not in ("train", "federate") and value is not None:
                shown = {str: f'"{value}"', bool: str(value).lower()}.get(type(value), str(value).replace("'", '"'))
                assert f"{key} = {shown}" in said
    assert f"rounds = {offer.federate.rounds}" in said


def test_the_limits_of_the_command_are_those_of_the_library():
    defaults = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    defaults |= {"max_time": seconds(defaults["max_time"]), "max_download": defaults["max_download"] * 1e9}
    assert {field.name: defaults[field.name] for field in dataclasses.fields(Limits)} == dataclasses.asdict(Limits())


class ReadyError(Exception):
    """The client has all it needs."""


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """A function that joins until the client would train: the welcome's offer → the folder of what it remembers."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n' * 100)

    def open_session(proxy, offer, limits, *, state, trust_remote_code):  # noqa: F811
        raise ReadyError(state)

    def begin(offered, key=None, **fields):
        monkeypatch.setattr(Owner, "ask", lambda owner: Welcome("bank", "token", offered))
        monkeypatch.setattr(joining_module, "fetch_proxy", lambda *_, **__: tmp_path / "proxy")
        monkeypatch.setattr(joining_module.Session, "open", open_session)
        client, silent = Client(data=str(rows)), lambda *_: None
        told = dict.fromkeys(
            ("on_welcome", "on_bytes", "on_ready", "on_step", "on_answer", "on_refusal", "on_verdict"), silent
        )
        with pytest.raises(ReadyError) as reached:
            join(Joining(Address("127.0.0.1", 1), key, client=client, cache=tmp_path / "cache", **fields), **told)
        return reached.value.args[0]

    return begin


def test_what_a_client_remembers_is_kept_apart_by_the_authority_and_by_the_run(ready, tmp_path):
    keys = [tmp_path / name for name in ("first", "second")]
    for folder in keys:
        init_keys(folder)
        add_client(folder, "bank")
    runs = OFFER, dataclasses.replace(OFFER, id="r2")
    found = [ready(run, key) for key in (*(client_key_file(folder, "bank") for folder in keys), None) for run in runs]
    assert len(set(found)) == 6
    assert all(path.is_relative_to(tmp_path / "cache" / "clients") for path in found)
    assert not any(one.is_relative_to(other) for one in found for other in found if one != other)
    again = client_key_file(keys[0], "bank")
    assert ready(OFFER, again) == ready(OFFER, again, ca=keys[0] / "ca.crt") == found[0]


def test_only_the_offer_that_is_pinned_is_taken(ready):
    assert ready(OFFER, offer=OFFER.sha256)
    other = dataclasses.replace(OFFER, max_rows=99)
    with pytest.raises(FederationError) as refused:
        ready(other, offer=OFFER.sha256)
    assert OFFER.sha256 in str(refused.value)
    assert other.sha256 in str(refused.value)


@pytest.mark.parametrize("every_round", [False, True])
def test_a_result_that_is_not_shared_is_refused_before_anything_is_fetched(ready, tmp_path, every_round):
    alone = dataclasses.replace(OFFER, federate=dataclasses.replace(OFFER.federate, share_result=False))
    assert ready(OFFER, out=tmp_path / "out") == ready(alone)
    with pytest.raises(FederationError, match="share_result"):
        ready(alone, out=tmp_path / "out", every_round=every_round)
    assert not (tmp_path / "out").exists()
    assert alone.sha256 != OFFER.sha256


def test_what_lies_where_the_result_is_to_be_is_found_at_once(ready, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="out"):
        ready(OFFER, out=tmp_path / "out")
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UsageError, match="was not made by fedproxy"):
        ready(OFFER, out=tmp_path / "out", every_round=True)
    with pytest.raises(UsageError, match="jsonl"):
        ready(OFFER, out=tmp_path / "rows.jsonl")


@pytest.mark.parametrize("limits", [Limits(min_rows=101), Limits(max_rounds=3), Limits(max_steps=4)])
def test_what_the_limits_forbid_is_not_fetched(ready, limits):
    with pytest.raises(FederationError) as refused:
        ready(OFFER, limits=limits)
    (name,) = (f.name for f in dataclasses.fields(Limits) if getattr(limits, f.name) != f.default)
    assert name in str(refused.value)


@pytest.mark.parametrize("offer", ["x", "0" * 63, "g" * 64])
def test_a_pin_that_is_no_hash_is_a_mistake(capsys, offer):
    with pytest.raises(SystemExit) as end:
        main(["join", "127.0.0.1:1", "--insecure", "--name", "bank", "--data", "x", "--offer", offer])
    assert end.value.code == 2
    assert offer in capsys.readouterr().err
