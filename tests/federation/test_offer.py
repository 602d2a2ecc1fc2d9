import dataclasses
import json
import re

import pytest

from fedproxy.config import LLM, Client, Compress, Evaluate, Experiment, Federate, Fuse, Heal, Privacy, Train
from fedproxy.errors import ArtifactError
from fedproxy.federation.offer import DeclinedError, Limits, Offer, check_offer, make_offer
from fedproxy.federation.protocol import PROTOCOL
from fedproxy.privacy.attacks.orders import nearly_linear

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


JUST = {"min_rows": 80, "min_steps": 5, "max_rounds": 4, "max_steps": 5}
JUST |= {"max_rank": 32, "max_length": 512, "max_batch_size": 16}
"""What the offer asks for to the number, of a client with 100 rows: five steps of 16 rows each."""


def test_what_the_limits_allow_is_taken():
    check_offer(OFFER, Limits(), rows=100, steps=5)
    check_offer(OFFER, Limits(**JUST), rows=100, steps=5)


def test_an_offer_whose_updates_would_be_sums_of_gradients_is_declined_by_default():
    offer = dataclasses.replace(OFFER, train=dataclasses.replace(OFFER.train, **nearly_linear()))
    with pytest.raises(DeclinedError, match=r"adam_epsilon = 1000.*max_adam_epsilon"):
        check_offer(offer, Limits(), rows=100, steps=5)
    check_offer(offer, Limits(max_adam_epsilon=1e3), rows=100, steps=5)


@pytest.mark.parametrize("limit", JUST)
def test_a_clients_limits(limit):
    asked, allowed = JUST[limit], JUST[limit] + (1 if limit.startswith("min_") else -1)
    with pytest.raises(DeclinedError) as declined:
        check_offer(OFFER, Limits(**{**JUST, limit: allowed}), rows=100, steps=5)
    assert {limit, str(asked), str(allowed)} <= set(re.findall(r"\w+", str(declined.value)))
    assert not (JUST.keys() - {limit}) & set(re.findall(r"\w+", str(declined.value)))


def test_all_limits_that_are_passed_are_named():
    with pytest.raises(DeclinedError) as declined:
        check_offer(OFFER, Limits(max_rounds=3, max_rank=31, min_rows=81), rows=100, steps=5)
    assert {"max_rounds", "max_rank", "min_rows"} <= set(re.findall(r"\w+", str(declined.value)))


@pytest.mark.parametrize(
    ("train", "rows", "steps"),
    [
        ({"batch_size": 1, "max_steps": 1}, 1000, 1),
        ({"batch_size": 1, "max_steps": 15}, 1000, 15),
        ({"batch_size": 64}, 15, 10),
        ({"batch_size": 64, "warmup_steps": 1}, 1000, 2),
        ({"batch_size": 64, "warmup_steps": 1000}, 1000, 2),
        ({"batch_size": 64}, 64, 1),
    ],
)
def test_an_update_of_few_rows_or_of_one_step_is_declined_by_default(train, rows, steps):
    offer = dataclasses.replace(OFFER, train=Train(**train))
    with pytest.raises(DeclinedError):
        check_offer(offer, Limits(), rows=rows, steps=steps)


def others():
    """The offer with each of its settings changed, and those of its tables."""
    for field in dataclasses.fields(Offer):
        value = getattr(OFFER, field.name)
        if field.name == "train":
            for key, other in OTHER_TRAIN.items():
                yield f"train.{key}", dataclasses.replace(OFFER, train=dataclasses.replace(value, **{key: other}))
        elif field.name == "federate":
            for key, other in OTHER_FEDERATE.items():
                changed = dataclasses.replace(value, **{key: other})
                yield f"federate.{key}", dataclasses.replace(OFFER, federate=changed)
        elif field.name != "id":
            other = value + 1 if isinstance(value, int) else value[:-1] + "2"
            yield field.name, dataclasses.replace(OFFER, **{field.name: other})


OTHER_TRAIN = {"lora_targets": "all-linear", "max_steps": None, "lr_scheduler_type": "cosine", "precision": "fp32"}
OTHER_TRAIN |= {"privacy": Privacy(epsilon=3.0)}
OTHER_TRAIN |= {"quantization": "4bit", "blocks": [0], "report_to": ["wandb"], "lora_dropout": 0.2}
OTHER_TRAIN |= {
    field.name: not value if isinstance(value, bool) else value / 2 + 0.01 if isinstance(value, float) else value + 1
    for field in dataclasses.fields(Train)
    if field.name not in OTHER_TRAIN and isinstance(value := getattr(OFFER.train, field.name), bool | int | float)
}
OTHER_FEDERATE = {"rounds": 5, "regulariser": "pcr", "regulariser_strength": None, "space": "frozen-a"}
OTHER_FEDERATE |= {"wire": "int4", "wire_options": {"block": 64}, "wire_down": "bf16"}


def test_the_hash_is_another_for_whatever_is_asked_but_not_for_another_run():
    found = {name: offer.sha256 for name, offer in others()}
    assert OTHER_TRAIN.keys() == {field.name for field in dataclasses.fields(Train)}
    assert len({OFFER.sha256, *found.values()}) == len(found) + 1
    assert dataclasses.replace(OFFER, id="r2").sha256 == OFFER.sha256


def test_the_hash_is_the_same_at_the_client_in_whatever_order_it_was_sent():
    values = json.loads(OFFER.encode())
    turned = {key: values[key] for key in reversed(values)}
    turned["train"] = {key: turned["train"][key] for key in reversed(turned["train"])}
    del turned["train"]["weight_decay"]  # left at its default
    assert Offer.decode(json.dumps(turned)).sha256 == Offer.decode(OFFER.encode()).sha256 == OFFER.sha256


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


def test_what_is_scored_is_offered_and_training_alone_counts():
    scored = dataclasses.replace(EXPERIMENT, federate=Federate(rounds=4, validation=0.25, alone=True, keep="best"))
    offer = Offer.decode(make_offer(scored, "bank", run_id="r1", proxy="0" * 64, start="1" * 64).encode())
    assert (offer.federate.validation, offer.federate.alone, offer.federate.keep) == (0.25, True, "last")
    check_offer(offer, Limits(max_steps=10), rows=100, steps=5)
    with pytest.raises(DeclinedError, match="steps a round = 10, this client allows 9"):
        check_offer(offer, Limits(max_steps=9), rows=100, steps=5)
    with pytest.raises(ArtifactError, match="alone: needs validation"):
        Offer.decode(changed(alone=True))
