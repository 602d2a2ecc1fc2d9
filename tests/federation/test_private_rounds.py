"""[train.privacy] over rounds: what leaves, what it costs, and what a repeated round gives."""

import json
import shutil
from dataclasses import replace

import pytest

import fedproxy
from fedproxy.adapter_files import read_adapter
from fedproxy.artifacts import read_json
from fedproxy.errors import ArtifactError, MissingExtraError, UsageError
from fedproxy.federation.client_rows import ClientRows
from fedproxy.federation.client_update import client_update
from fedproxy.federation.messages import Order, Refusal, Reply
from fedproxy.federation.offer import Limits, make_offer
from fedproxy.federation.protocol import encode_order, take_reply
from fedproxy.federation.session import Session
from fedproxy.pipeline import prepare, read_experiment
from fedproxy.privacy.budget import Budget
from fedproxy.privacy.plan import Plan
from fedproxy.records import Round
from fedproxy.tensors import Tensors, digest
from fedproxy.typed_json import read_record
from tests.test_pipeline import write_experiment

ROWS = [{"prompt": f"say {word}:", "completion": f" {word}"} for word in ("one", "two", "three", "four")]


def private_experiment(folder, llm, calibration, *, extra="", rounds=2, epsilon=8.0):
    path = write_experiment(folder, llm, calibration, extra=extra, rounds=rounds)
    text = path.read_text().replace("lora_r = 2\n", "lora_r = 2\npadding_free = false\n")
    path.write_text(f"{text}\n[train.privacy]\nepsilon = {epsilon}\n")
    return path


@pytest.fixture(scope="module")
def opened(tmp_path_factory, tiny_checkpoint, calibration):
    """A function that opens a client's session on a state of its own: the folder of the state → session, adapter."""
    folder = tmp_path_factory.mktemp("private")
    path = private_experiment(folder, tiny_checkpoint(), calibration, extra='wire = "int4"\n')
    with prepare(path, folder / "run"):
        pass
    settings = read_experiment(path)
    offer = make_offer(settings, "numbers", run_id="r", proxy="0" * 64, start="0" * 64)
    adapter = read_adapter(folder / "run" / "start")[1]

    def open_session(state, purse=None, offer=offer):
        session = Session.open(folder / "run" / "proxy", offer, Limits(min_rows=1, min_steps=1), state=state)
        session.purse = purse
        session.add("numbers", session.encode(ROWS))
        return session

    open_session.adapter, open_session.offer = adapter, offer
    return open_session


def test_a_server_whose_clients_are_elsewhere_needs_no_accounting(tmp_path, tiny_checkpoint, calibration, monkeypatch):
    path = private_experiment(tmp_path, tiny_checkpoint(), calibration)
    monkeypatch.setattr("fedproxy.privacy.accounting.find_spec", lambda name: None)
    with prepare(path, tmp_path / "served") as directory:
        assert (directory.path / "start").is_dir()
    with pytest.raises(MissingExtraError, match="privacy"), prepare(path, tmp_path / "here", rows=ClientRows({})):
        pass


def ask(session, adapter, spool, number=1, **fields):
    order = Order(number, adapter, **fields)
    data, _, fault = session.answer("numbers", encode_order(order))
    answer = take_reply(data, spool / f"answer-{number}", order, "numbers", "int4")
    return answer, data, fault


def moved(adapter: Tensors, by: float) -> Tensors:
    return {name: tensor + by for name, tensor in adapter.items()}


def test_of_a_private_training_only_the_update_leaves(opened, tmp_path):
    reply, data, fault = ask(opened(tmp_path / "state"), opened.adapter, tmp_path)
    assert fault is None
    assert (reply.loss, reply.tokens, reply.peak_memory, reply.validation) == (None, 0, 0, {})
    head = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["head"])
    plan = Plan.of(opened.offer.train.privacy, opened.offer.train, rows=4, steps=1, rounds=2)
    assert head["epsilon"] == reply.epsilon == plan.spent(1)
    of_the_rows = {"loss", "tokens", "peak_memory", "validation"}
    assert {key: head[key] for key in of_the_rows} == {"loss": None, "tokens": 0, "peak_memory": 0, "validation": {}}
    told = set(head) - of_the_rows
    assert told == {
        *("message", "protocol", "version", "sha256", "client", "round", "rows", "steps", "seconds", "numbers", "wire"),
        "epsilon",
    }


def test_an_order_that_comes_again_gets_the_same_answer_and_costs_nothing(opened, tmp_path):
    first, _, _ = ask(opened(tmp_path / "state"), opened.adapter, tmp_path)
    kept = digest(first.update)
    again, _, _ = ask(opened(tmp_path / "state"), opened.adapter, tmp_path)  # by another process
    assert (digest(again.update), again.epsilon) == (kept, first.epsilon)
    other, _, _ = ask(opened(tmp_path / "other"), opened.adapter, tmp_path)
    assert digest(other.update) != kept, "two trainings have noise of their own"


def test_no_more_trainings_than_were_announced_are_given_away(opened, tmp_path):
    session = opened(tmp_path / "state")
    spent = []
    for number in (1, 2):
        reply, _, _ = ask(session, moved(opened.adapter, number), tmp_path, number)
        spent.append(reply.epsilon)
    assert 0 < spent[0] < spent[1] <= 8.0
    refusal, _, fault = ask(session, moved(opened.adapter, 3), tmp_path, 2)
    assert isinstance(refusal, Refusal)
    assert refusal.kind == "declined"
    assert "all 2 that were announced were done" in str(fault)
    assert isinstance(ask(session, moved(opened.adapter, 2), tmp_path, 2)[0], Reply), "what was answered is again"


def test_a_damaged_count_is_told(opened, tmp_path):
    ask(opened(tmp_path / "state"), opened.adapter, tmp_path)
    [path] = (tmp_path / "state").rglob("released.safetensors")
    path.write_bytes(b"\1")
    answer, _, fault = ask(opened(tmp_path / "state"), opened.adapter, tmp_path)
    assert isinstance(fault, ArtifactError)
    assert isinstance(answer, Refusal)


def test_the_clients_own_budget_stops_it_whatever_the_server_asks(opened, tmp_path):
    train = opened.offer.train
    plan = Plan.of(train.privacy, train, rows=4, steps=1, rounds=2)
    purse = Budget(tmp_path / "budget", ROWS, plan.spent(1) * 1.01)
    session = opened(tmp_path / "state", purse)
    reply, _, fault = ask(session, opened.adapter, tmp_path)
    assert fault is None
    assert purse.spent == reply.epsilon
    refusal, _, fault = ask(session, moved(opened.adapter, 1), tmp_path, 2)
    assert refusal.kind == "declined"
    assert "this client allows" in refusal.reason
    assert "max_epsilon" in refusal.reason
    # another run, by another server, of another state
    refusal, _, _ = ask(opened(tmp_path / "new", Budget(tmp_path / "budget", ROWS, 0.5)), opened.adapter, tmp_path)
    assert refusal.kind == "declined"


def test_what_is_killed_before_its_answer_leaves_is_paid_for(opened, tmp_path, monkeypatch):
    purse = Budget(tmp_path / "budget", ROWS, 100.0)
    session = opened(tmp_path / "state", purse)

    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("fedproxy.federation.client.wrap_update", killed)
        with pytest.raises(Killed):
            ask(session, opened.adapter, tmp_path)
    spent = purse.spent
    assert spent > 0
    reply, _, _ = ask(opened(tmp_path / "state", purse), opened.adapter, tmp_path)
    assert purse.spent == spent == reply.epsilon, "it was trained once, and that is what is given"


@pytest.mark.parametrize("space", ["factors", "frozen-a", "product"])
@pytest.mark.parametrize("regulariser", ["pcr", "scaffold"])
def test_rounds_say_what_they_cost(tmp_path, tiny_checkpoint, calibration, space, regulariser):
    if space == "product" and regulariser == "scaffold":
        regulariser = "none"
    path = private_experiment(
        tmp_path,
        tiny_checkpoint(num_hidden_layers=2),
        calibration,
        extra=f'space = "{space}"\nregulariser = "{regulariser}"\n',
    )
    run = fedproxy.federate(path, tmp_path / "run")
    spent = [[client["epsilon"] for client in record["clients"].values()] for record in run.rounds]
    assert all(0 < one < two <= 8.0 for one, two in zip(*spent, strict=True))
    assert all(two > 7.9 for two in spent[1])
    assert all(client["loss"] is None for record in run.rounds for client in record["clients"].values())
    record = read_record(tmp_path / "run" / "rounds" / "0002" / "round.json", Round)
    assert record.clients["numbers"].epsilon == spent[1][1]
    assert record.loss is None


def test_a_run_that_goes_on_pays_no_training_twice(tmp_path, tiny_checkpoint, calibration):
    path = private_experiment(tmp_path, tiny_checkpoint(num_hidden_layers=2), calibration)
    fedproxy.federate(path, tmp_path / "run")
    before = read_json(tmp_path / "run" / "rounds" / "0002" / "round.json")
    adapter = (tmp_path / "run" / "rounds" / "0002" / "adapter.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "rounds" / "0002")
    run = fedproxy.federate(path, tmp_path / "run", resume=True)
    assert [c["epsilon"] for c in run.rounds[1]["clients"].values()] == [
        c["epsilon"] for c in before["clients"].values()
    ]
    assert (tmp_path / "run" / "rounds" / "0002" / "adapter.safetensors").read_bytes() == adapter


def test_two_runs_differ_for_nobody_can_foretell_the_noise(tmp_path, tiny_checkpoint, calibration):
    path = private_experiment(tmp_path, tiny_checkpoint(num_hidden_layers=2), calibration, rounds=1)
    for name in ("1", "2"):
        fedproxy.federate(path, tmp_path / name)
    one, two = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("1", "2"))
    assert one != two


def test_a_federation_of_ones_own_is_refused(opened):
    from fedproxy.config import Train
    from tests.conftest import make_tokenizer

    with pytest.raises(UsageError, match="remembers what it spent"):
        client_update(
            None,
            ROWS,
            opened.adapter,
            tokenizer=make_tokenizer(),
            train=Train(privacy={"epsilon": 1.0}),
            client="bank",
            round=1,
        )


def test_limits_decline_what_is_not_private(opened):
    from fedproxy.federation.offer import DeclinedError, check_offer

    offer = replace(opened.offer, train=replace(opened.offer.train, privacy=None))
    with pytest.raises(DeclinedError, match="trains with it alone"):
        check_offer(offer, Limits(min_rows=1, min_steps=1, max_epsilon=3.0), rows=4, steps=2)
