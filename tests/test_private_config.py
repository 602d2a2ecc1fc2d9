"""[train.privacy]: what it may hold, and what is refused beside it."""

import dataclasses
import json
import tomllib

import pytest

from fedproxy.config import Federate, Privacy, Train, load_experiment, to_toml, unprivate
from fedproxy.config.checked import TableError
from fedproxy.errors import ArtifactError, ConfigError
from fedproxy.federation.offer import Offer
from tests.federation.test_offer import OFFER
from tests.test_pipeline import write_experiment

GOOD = {"epsilon": 3.0, "delta": 1e-5, "clip": 0.5}


def test_a_table_in_a_table_is_the_same_however_it_is_given():
    made = Train(privacy=Privacy(**GOOD))
    assert Train(privacy=GOOD) == made
    assert Train(privacy={"epsilon": 3}).privacy == Privacy(epsilon=3.0, delta=None, clip=1.0)
    values = tomllib.loads(to_toml({"train": {"privacy": dataclasses.asdict(made)["privacy"]}}))
    assert Train(**values["train"]) == made
    assert tomllib.loads("[train.privacy]\nepsilon = 3.0\ndelta = 1e-5\nclip = 0.5")["train"] == values["train"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epsilon": 0.0}, "epsilon = 0.0: must be at least 0.01"),
        ({"epsilon": 101.0}, "at most 100"),
        ({"epsilon": "3"}, "epsilon = '3': must be a number"),
        ({"delta": 1.0}, "delta = 1.0: must be above 0 and below 0.1"),
        ({"clip": 0.0}, "clip = 0.0: must be greater than 0"),
        ({"epsilom": 3.0}, 'has no key "epsilom". Did you mean "epsilon"?'),
    ],
)
def test_what_is_wrong_with_it_is_told(change, says):
    with pytest.raises(TableError) as caught:
        Train(privacy={**GOOD, **change})
    assert list(caught.value.faults) == ["privacy"]
    assert says in str(caught.value)


def test_a_budget_is_needed():
    with pytest.raises(TableError, match="epsilon = None: must be given"):
        Train(privacy={"delta": 1e-5})


SAFE = Train(privacy=GOOD, padding_free=False)
CLASHES = {
    "padding_free = false": (dataclasses.replace(SAFE, padding_free=True), Federate()),
    "report_to": (dataclasses.replace(SAFE, report_to=["tensorboard"]), Federate()),
    "validation = 0": (SAFE, Federate(validation=0.1)),
}


@pytest.mark.parametrize("says", CLASHES)
def test_what_it_does_not_cover_is_refused_by_name(says):
    train, federate = CLASHES[says]
    [problem] = unprivate(train, federate)
    assert says in problem
    assert list(unprivate(SAFE, Federate())) == []
    assert list(unprivate(dataclasses.replace(train, privacy=None), federate)) == []


@pytest.mark.parametrize("says", CLASHES)
def test_a_client_refuses_an_offer_that_asks_for_it(says):
    train, federate = CLASHES[says]
    offer = dataclasses.replace(OFFER, train=train, federate=dataclasses.replace(OFFER.federate, **asked(federate)))
    with pytest.raises(ArtifactError, match=says):
        Offer.decode(offer.encode())


def asked(federate):
    return {"validation": federate.validation}


def test_it_travels_in_the_offer():
    offer = dataclasses.replace(OFFER, train=SAFE, federate=dataclasses.replace(OFFER.federate, validation=0.0))
    assert Offer.decode(offer.encode()).train.privacy == Privacy(**GOOD)
    values = json.loads(offer.encode())
    values["train"]["privacy"]["epsilon"] = -1.0
    with pytest.raises(ArtifactError, match=r"epsilon = -1\.0"):
        Offer.decode(json.dumps(values))


def test_a_file_is_refused_with_all_of_it(tmp_path, tiny_checkpoint, calibration):
    path = write_experiment(tmp_path, tiny_checkpoint(), calibration, extra="validation = 0.1\n")
    path.write_text(path.read_text() + "[train.privacy]\nepsilon = 3.0\n")
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert len(caught.value.problems) == 2
    path.write_text(
        path.read_text()
        .replace("validation = 0.1\n", "")
        .replace("max_length = 32\n[fed", "max_length = 32\npadding_free = false\n[fed")
    )
    assert load_experiment(path).train.privacy == Privacy(epsilon=3.0)
