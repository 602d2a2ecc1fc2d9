import dataclasses
import json

import pytest

from fedproxy.config import LLM, Client, Compress, Evaluate, Experiment, Federate, Fuse, Heal, Train
from fedproxy.errors import ArtifactError
from fedproxy.federation.offer import Limits, Offer, check_offer, make_offer
from fedproxy.federation.protocol import PROTOCOL

EXPERIMENT = Experiment(
    name="intents",
    seed=7,
    llm=LLM("/secret/llm"),
    compress=Compress(calibration="/secret/public.txt"),
    heal=Heal(text="/secret/heal.txt"),
    client=(Client("bank", data="/secret/bank.jsonl", rows=100), Client("shop", data="/secret/shop.jsonl")),
    train=Train(max_steps=5, lora_targets=["q_proj"], learning_rate=1e-3),
    federate=Federate(rounds=4, regulariser="fedprox", regulariser_strength=0.5),
    fuse=Fuse(public="/secret/fuse.txt"),
    evaluate=Evaluate(data="/secret/tasks", include="/secret/yaml"),
)
OFFER = make_offer(EXPERIMENT, "bank", run_id="r1", proxy="0" * 64, start="1" * 64)


def test_an_offer_comes_back_as_made():
    assert Offer.decode(OFFER.encode()) == OFFER
    other = make_offer(EXPERIMENT, "shop", run_id="r1", proxy="0" * 64, start="1" * 64)
    assert Offer.decode(other.encode()).max_rows is None
    assert (OFFER.max_rows, OFFER.train, OFFER.seed, OFFER.federate.rounds) == (100, EXPERIMENT.train, 7, 4)


def test_no_path_is_in_it():
    assert "secret" not in OFFER.encode()


def changed(**values):
    whole = {**json.loads(OFFER.encode()), **values}
    return json.dumps({key: value for key, value in whole.items() if value is not ...})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no JSON"),
        ("[]", "no table"),
        ("[" * 10_000, "no JSON"),
        (changed(run="x" * 20_000), "16384 are read"),
        (
            changed(protocol=9, version="9.9"),
            rf"The server speaks protocol 9 \(fedproxy '9\.9'\), this side protocol {PROTOCOL}",
        ),
        (changed(path="/etc"), "path"),
        (changed(federate={"rounds": 9}), "federate"),
        (changed(max_rows=(1 << 63) + 1), "max_rows"),
        (changed(seed=...), "seed"),
        (changed(seed=True), "seed = True"),
        (changed(rounds=0), "rounds = 0"),
        (changed(rounds=10**30), "no JSON"),
        (changed(id="../x"), "id = '../x'"),
        (changed(id="/tmp/x"), "id = '/tmp/x'"),
        (changed(proxy="../x"), "proxy = '../x'"),
        (changed(regulariser="steal"), "regulariser = 'steal'"),
        (changed(regulariser_strength=float("nan")), "no JSON"),
        (changed(regulariser_strength=-1), "regulariser_strength = -1"),
        (changed(max_rows=0), "max_rows = 0"),
        (changed(space="full"), "space = 'full'"),
        (changed(wire="int3"), "wire = 'int3'"),
        (changed(wire=["int4"]), r"wire = \['int4'\]"),
        (changed(wire_down=...), "wire_down is missing"),
        (changed(wire_down="top-k"), "wire_down = 'top-k'"),
        (changed(rounds=3.0), "rounds = 3.0"),
        (changed(regulariser_strength=0).replace('"regulariser_strength": 0', '"regulariser_strength": 1e999'), "inf"),
        (changed(wire_options=[]), r"wire_options = \[\]"),
        (changed(wire="int4", wire_options={"blok": 1}), "wire_options: .*blok"),
        (changed(start="1"), "start = '1'"),
        (changed(run="a\nb"), "run = "),
        (changed(train=[]), "train"),
        (changed(train={"epochs": 0}), "epochs = 0: must be greater than 0"),
        (changed(train={"learning_rat": 1}), 'Did you mean "learning_rate"'),
        (changed(train={"batch_size": "16"}), "batch_size = '16': must be a whole number"),
        (changed(seed=-1, rounds=0), r"seed = -1[\s\S]*rounds = 0|rounds = 0[\s\S]*seed = -1"),
    ],
)
def test_a_bad_offer_is_refused(text, says):
    with pytest.raises(ArtifactError, match=says) as refused:
        Offer.decode(text)
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (Limits(), None),
        (Limits(max_steps=5, max_rounds=4), None),
        (Limits(take_part=False), "takes no part"),
        (Limits(max_steps=4), "5 optimizer steps a round, this client allows 4 (max_steps)"),
        (Limits(max_rounds=3), "rounds = 4, this client allows 3 (max_rounds)"),
    ],
)
def test_a_clients_limits(limits, says):
    found = check_offer(OFFER, limits, steps=5)
    assert found is None if says is None else says in found


def offered(client, spoken=None, **federate):
    experiment = dataclasses.replace(EXPERIMENT, federate=Federate(**federate))
    how = {} if spoken is None else {"spoken": spoken}
    return make_offer(experiment, client, run_id="r1", proxy="0" * 64, start="1" * 64, **how)


@pytest.mark.parametrize(
    ("spoken", "wire"), [(None, "int4"), ({"int4"}, "int4"), ({"bf16", "fp32"}, "fp32"), (set(), "fp32")]
)
def test_a_client_that_does_not_agree_to_the_encoding_sends_plain_updates(spoken, wire):
    offer = offered("bank", spoken, wire="int4", wire_options={"block": 64}, wire_down="int8")
    assert (offer.federate.wire, offer.federate.wire_options) == (wire, {"block": 64} if wire == "int4" else {})
    assert offer.federate.wire_down == "int8"
    assert Offer.decode(offer.encode()) == offer


def test_what_a_client_needs_of_the_rounds_is_in_it():
    settings = {
        "rounds": 7,
        "regulariser": "scaffold",
        "space": "frozen-a",
        "wire": "top-k",
        "wire_options": {"share": 0.5},
    }
    federate = Offer.decode(offered("bank", **settings).encode()).federate
    assert {key: getattr(federate, key) for key in settings} == settings


def test_a_client_of_a_lower_rank_is_offered_that_rank_at_the_same_scaling():
    clients = (Client("bank", data="b", lora_r=8), Client("shop", data="s"))
    experiment = dataclasses.replace(
        EXPERIMENT, client=clients, train=Train(lora_r=32, lora_alpha=64.0), federate=Federate(space="product")
    )
    bank, shop = (
        make_offer(experiment, name, run_id="r", proxy="0" * 64, start="1" * 64).train for name in ("bank", "shop")
    )
    assert (bank.lora_r, bank.lora_alpha, shop.lora_r, shop.lora_alpha) == (8, 16.0, 32, 64.0)
