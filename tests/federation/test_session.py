import errno
import tempfile

import pytest
import torch

from fedproxy.errors import ArtifactError, FederationError, ResourceError
from fedproxy.federation import client, client_state
from fedproxy.federation.messages import Order, Refusal, Reply
from fedproxy.federation.offer import make_offer
from fedproxy.federation.protocol import encode_order, take_reply
from fedproxy.federation.session import Session
from fedproxy.models.lora import read_adapter
from fedproxy.pipeline import prepare, read_experiment
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

    def tell(change=lambda data: data, adapter=adapter, **fields):
        order = Order(**{"round": 1, "adapter": adapter, **fields})
        answer, fault = session.answer("numbers", change(encode_order(order)))
        return take_reply(answer, folder / "answer", order, "numbers", "int4"), fault

    tell.state, tell.adapter = folder / "state" / "numbers", adapter
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
