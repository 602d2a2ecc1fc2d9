import errno
import itertools
import re
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fedproxy.adapter_files import read_adapter
from fedproxy.errors import ArtifactError, FederationError, ResourceError, SumsError
from fedproxy.federation import client, client_state
from fedproxy.federation import session as session_module
from fedproxy.federation.messages import Ask, Order, Refusal, Reply, Told
from fedproxy.federation.offer import DeclinedError, Limits, make_offer
from fedproxy.federation.protocol import encode_order, take_reply
from fedproxy.federation.session import Session
from fedproxy.pipeline import prepare, read_experiment
from fedproxy.privacy.sums import drawn
from tests.test_pipeline import write_experiment

ROWS = [{"prompt": f"say {word}:", "completion": f" {word}"} for word in ("one", "two")]


@pytest.fixture(scope="module")
def told(tmp_path_factory, tiny_checkpoint, calibration):
    """A function that lets a client answer: the order's bytes → what the server takes it for, and the fault."""
    folder = tmp_path_factory.mktemp("session")
    experiment = write_experiment(folder, tiny_checkpoint(), calibration, extra='wire = "int4"\n')
    with prepare(experiment, folder / "run"):
        pass
    settings = read_experiment(experiment)
    offer = make_offer(settings, "numbers", run_id="r", proxy="0" * 64, start="0" * 64)
    session = Session.open(folder / "run" / "proxy", offer, state=folder / "state")
    session.add("numbers", session.encode(ROWS))
    adapter = read_adapter(folder / "run" / "start")[1]

    def tell(change=lambda data: data, adapter=adapter, session=session, **fields):
        order = Order(**{"round": 1, "adapter": adapter, **fields})
        answer, _, fault = session.answer("numbers", change(encode_order(order)))
        return take_reply(answer, folder / "answer", order, "numbers", "int4"), fault

    def limited(*, steps=1, rows=ROWS, federate=None, state=folder / "limited", **limits):
        train = replace(offer.train, batch_size=1, epochs=float(steps) / len(rows))
        other = replace(offer, train=train, federate=replace(offer.federate, wire="fp32", **(federate or {})))
        allowed = Limits(**{"min_rows": 1, "min_steps": 1, **limits})
        made = Session.open(folder / "run" / "proxy", other, allowed, state=state)
        made.add("numbers", made.encode(rows))
        return made

    tell.state, tell.adapter, tell.limited = folder / "state" / "numbers", adapter, limited
    return tell


def test_a_reply_has_no_fault(told):
    reply, fault = told()
    assert (type(reply), fault) == (Reply, None)


@pytest.mark.parametrize(
    ("change", "order", "says"),
    [
        (lambda data: data[:-1], {}, "truncated"),
        (lambda data: data, {"adapter": {"w": torch.zeros(2)}}, "not one of the proxy"),
        (lambda data: data, {"round": 9}, "round 9 was ordered of 3"),
    ],
)
def test_an_order_that_cannot_be_used_is_the_servers_affair(told, change, order, says):
    answer, fault = told(change, **order)
    assert isinstance(answer, Refusal)
    assert isinstance(fault, FederationError)
    assert says in str(fault)
    assert "FederationError" in answer.reason
    assert says in answer.reason
    assert tempfile.gettempdir() not in answer.reason


def test_a_damaged_state_is_the_clients_affair(told):
    assert told()[1] is None
    (path,) = told.state.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    answer, fault = told(round=2, since=1)
    path.write_bytes(whole)
    assert isinstance(fault, ArtifactError)
    assert path.name in answer.reason
    assert str(path) in str(fault)
    assert "/" not in answer.reason
    assert isinstance(told(round=2, since=1)[0], Reply)


@pytest.mark.parametrize(
    ("where", "name", "error"),
    [
        (client_state, "save_tensors", OSError(errno.ENOSPC, "No space left on device", "/secret place/x")),
        (client, "train", MemoryError()),
        (client, "train", torch.OutOfMemoryError("CUDA out of memory")),
        (client, "train", OSError(errno.ENOSPC, "No space left on device", "/secret place/x")),
    ],
)
def test_want_of_disk_or_memory_is_the_clients_affair(told, monkeypatch, where, name, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(where, name, fails)
    answer, fault = told()
    assert isinstance(fault, ResourceError)
    assert isinstance(answer, Refusal)
    assert "ResourceError" in answer.reason
    assert not [part for part in (str(told.state.parent), "secret", "/") if part in answer.reason]


def test_a_bug_is_no_refusal(told, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(client, "train", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        told()


def test_a_round_is_repeated_so_often_and_no_more(told):
    session = told.limited(max_repeats=2)
    for _ in range(3):
        assert told(session=session)[1] is None
    assert told(session=session, round=2)[1] is None
    answer, fault = told(session=session)
    assert isinstance(fault, DeclinedError)
    assert {"max_repeats", "4", "2"} <= set(re.findall(r"\w+", answer.reason))
    assert (answer.kind, answer.round) == ("declined", 1)


def test_a_round_that_takes_longer_is_given_up_after_the_step(told):
    steps = []
    answer, fault = told(session=told.limited(steps=3, max_time=0.0, min_steps=3))
    assert isinstance(fault, DeclinedError)
    assert {"max_time", "1", "3"} <= set(re.findall(r"\w+", answer.reason))
    session = told.limited(steps=1, max_time=0.0)  # what is done is sent, however long it took
    assert session.train("numbers", Order(1, told.adapter), lambda *step: steps.append(step)).steps == 1
    assert [step[:3] for step in steps] == [(1, 1, 1)]


ASKS = {"train": {"ask": Ask("mask", label="values", threshold=3)}, "sum": {"trains": False, "ask": Ask("advertise")}}


@pytest.mark.parametrize(("secure", "orders"), [(True, [{}]), (False, ASKS.values())])
def test_an_order_is_with_secure_sums_exactly_where_they_were_offered(told, secure, orders):
    session = told.limited(federate={"secure": secure})
    for fields in orders:
        adapter = {} if fields.get("trains") is False else told.adapter
        answer, fault = told(session=session, adapter=adapter, **fields)
        assert type(fault) is FederationError
        assert isinstance(answer, Refusal)
        assert f"round 1 is not {'with' if secure else 'without'} secure sums, as it was offered" in answer.reason


def test_without_keys_a_client_takes_no_part_in_secure_sums(told):
    answer, fault = told(session=told.limited(federate={"secure": True}), adapter={}, **ASKS["sum"])
    assert isinstance(fault, DeclinedError)
    assert (answer.kind, "no keys for secure sums" in answer.reason) == ("declined", True)


def test_each_step_of_a_round_is_repeated_so_often_and_no_more(told, tmp_path):
    session = told.limited(federate={"secure": True}, max_repeats=1, state=tmp_path)
    session.identities = drawn(["numbers", "colours", "animals"])
    for _ in range(2):
        answer, fault = told(session=session, adapter={}, **ASKS["sum"])
        assert (type(answer), fault) == (Told, None)
    assert "ordered 3 times" in str(told(session=session, adapter={}, **ASKS["sum"])[1])
    assert told(session=session, adapter={}, round=2, **ASKS["sum"])[1] is None


def test_what_would_give_an_update_away_is_declined(told, tmp_path):
    session = told.limited(federate={"secure": True}, state=tmp_path)
    session.identities = drawn(["numbers", "colours", "animals"])
    told(session=session, adapter={}, **ASKS["sum"])
    few = Ask("share", threshold=1, letters={"numbers": b"", "colours": b"", "animals": b""})
    answer, fault = told(session=session, adapter={}, trains=False, ask=few)
    assert (answer.kind, type(fault)) == ("declined", SumsError)


def test_rows_without_a_token_to_learn_do_not_count(told):
    empty = [{"text": ""}]
    assert told.limited(rows=ROWS * 2, min_rows=4, steps=4)
    with pytest.raises(DeclinedError) as declined:
        told.limited(rows=ROWS + empty * 2, min_rows=4, steps=4)
    assert {"min_rows", "2", "4"} <= set(re.findall(r"\w+", str(declined.value)))


def test_a_client_without_rows_to_score_on_declines_to_and_gives_no_scores(told):
    answer, fault = told(trains=False)
    assert (answer.kind, type(fault)) == ("declined", DeclinedError)
    assert told(untuned=True)[0].validation == {}


@pytest.fixture
def scoring(told):
    """A function that opens a session of a client that keeps rows back, with its state in a folder."""

    def open_session(folder, max_repeats=1, **limits):
        scores = {"validation": 0.5, "alone": True}
        made = told.limited(steps=2, max_repeats=max_repeats, federate=scores, state=folder, **limits)
        made.take_rows("numbers", ROWS, ROWS)
        return made

    return open_session


def test_an_adapter_is_scored_so_often_and_no_more(told, scoring, tmp_path):
    session = scoring(tmp_path)
    assert told(session=session, trains=False)[0] == told(session=session, trains=False)[0]
    assert "ordered 3 times" in str(told(session=session, trains=False)[1])
    assert told(session=session)[1] is None


def test_the_untuned_proxy_scores_as_the_first_adapter_and_alone_is_what_a_federation_of_one_would_be(
    told, scoring, tmp_path
):
    session = scoring(tmp_path)
    before = told(session=session, trains=False)[0].score
    first = told(session=session, untuned=True)[0].validation
    assert first["untuned"].loss == pytest.approx(before.loss, abs=1e-5)
    assert first["alone"] == first["own"]
    assert first["own"].loss != first["untuned"].loss
    update = session.train("numbers", Order(1, told.adapter)).update
    merged = {name: told.adapter[name] + value for name, value in update.items()}
    second = session.train("numbers", Order(2, merged, since=1)).validation
    assert second["alone"] == second["own"]
    elsewhere = session.train("numbers", Order(2, told.adapter, since=1)).validation
    assert elsewhere["alone"] == second["alone"]
    assert elsewhere["own"] != second["own"]


def test_who_lost_what_it_trained_alone_says_nothing_of_it_any_more(told, scoring, tmp_path):
    session = scoring(tmp_path, 9)
    session.train("numbers", Order(1, told.adapter))
    whole = session.train("numbers", Order(2, told.adapter, since=1)).validation
    assert set(whole) == {"own", "alone"}
    for path in (tmp_path / "numbers" / "alone").iterdir():
        path.unlink()
    assert set(session.train("numbers", Order(2, told.adapter, since=1)).validation) == {"own"}
    assert set(session.train("numbers", Order(3, told.adapter, since=2)).validation) == {"own"}


def test_scoring_that_takes_longer_is_given_up_after_what_was_read(told, scoring, tmp_path):
    session = scoring(tmp_path, max_time=0.0)
    answer, fault = told(session=session, trains=False)
    assert isinstance(fault, DeclinedError)
    assert re.search(r"round 1 took .* for 1 of 6 texts to score, .* 0 s at most \(max_time\)", answer.reason)
    assert (answer.kind, answer.round) == ("declined", 1)


@pytest.mark.parametrize("untuned", [True, False])
def test_the_time_of_an_order_runs_on_from_training_to_every_score(told, scoring, tmp_path, monkeypatch, untuned):
    """The clock moves a second a look; two rows with two labels are six texts. What is done is never given up."""
    score = (6, "texts to score")
    work = [(2, "steps"), score, *[score] * untuned, (2, "steps alone"), score]
    looks = [(done, whole, what) for whole, what in work for done in range(1, whole + 1)]
    for limit in range(len(looks) + 1):
        monkeypatch.setattr(session_module, "time", SimpleNamespace(monotonic=itertools.count().__next__))
        session = scoring(tmp_path / str(limit), max_time=limit + 0.5)
        answer, fault = told(session=session, untuned=untuned)
        if given_up := next((look for look in looks[limit:] if look[0] < look[1]), None):
            assert "for {} of {} {}, this client".format(*given_up) in answer.reason
        else:
            assert (fault, len(answer.validation)) == (None, 2 + untuned)
