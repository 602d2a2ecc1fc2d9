import dataclasses

import pytest

from fedproxy.config import LLM, Client, Compare, Compress, Experiment, Federate, Fuse, Heal, Variant
from fedproxy.federation.settings import check_settings
from fedproxy.methods import METHODS, configured, methods_of

EXPERIMENT = Experiment(
    llm=LLM("llm"),
    compress=Compress(score="magnitude", keep_first=1),
    client=(Client("a", "a.jsonl"),),
    federate=Federate(
        rounds=7,
        merge="h-ties",
        merge_options={"rho": 1.5},
        server_optimizer="fedadam",
        server_options={"tau": 0.1},
        regulariser="pcr",
        regulariser_strength=2.0,
    ),
)


@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_a_possible_experiment_that_changes_nothing_else(name: str) -> None:
    method = METHODS[name]
    found = configured(method, EXPERIMENT, seed=3, remove=0.25)
    check_settings(found.federate)
    assert method.name == name
    assert (found.seed, found.compress.remove) == (3, 0.0 if method.whole else 0.25)
    chosen = {"remove", "score", "keep_first", "keep_last", "steps", "spare_ends", "realign_steps", "blocks"}
    chosen |= {"merge", "space", "server_optimizer", "regulariser"}
    chosen |= {"merge_options", "server_options", "regulariser_strength"}
    for table in dataclasses.fields(Experiment):
        before, after = getattr(EXPERIMENT, table.name), getattr(found, table.name)
        if dataclasses.is_dataclass(before):
            changed = {f.name for f in dataclasses.fields(before) if getattr(before, f.name) != getattr(after, f.name)}
            assert changed <= chosen
        elif table.name != "seed":
            assert before == after
    assert set(method.axes) == set(METHODS["fedproxy"].axes)


def test_options_stay_where_the_experiment_names_the_same_choice() -> None:
    def federate(name: str) -> Federate:
        return configured(METHODS[name], EXPERIMENT, seed=0, remove=0.5).federate

    assert federate("fedproxy").merge_options == {"rho": 1.5}
    assert federate("fedproxy").regulariser_strength == 2.0
    assert federate("fedproxy").server_options == {}
    assert federate("fedadam").server_options == {"tau": 0.1}
    assert federate("fedadam").merge_options == {}
    assert federate("fedprox").regulariser_strength is None
    assert federate("ties").rounds == 7


def test_fedproxy_as_published_whatever_the_experiment_chooses() -> None:
    """By default it is FedProxy; where the experiment departs from the paper, FedProxy goes along, and it does not."""
    plain = Experiment(llm=LLM("llm"), compress=Compress(calibration="public.txt"))
    ours, theirs = (configured(METHODS[name], plain, seed=0, remove=0.5) for name in ("fedproxy", "fedproxy-paper"))
    assert ours == theirs
    other = dataclasses.replace(
        plain,
        compress=dataclasses.replace(plain.compress, score="uniform", keep_first=1),
        heal=Heal(steps=5),
        federate=dataclasses.replace(EXPERIMENT.federate, rounds=plain.federate.rounds, space="product"),
        fuse=Fuse(scale="auto", public="public.txt"),
    )
    ours, theirs = (configured(METHODS[name], other, seed=0, remove=0.5) for name in ("fedproxy", "fedproxy-paper"))
    assert theirs == configured(METHODS["fedproxy-paper"], plain, seed=0, remove=0.5)
    assert (ours.compress.score, ours.heal.steps, ours.federate.space) == ("uniform", 5, "product")
    assert (ours.federate.regulariser_strength, ours.fuse.scale) == (2.0, "auto")


def test_fedbiot_heals_as_published_unless_the_experiment_says_otherwise() -> None:
    assert configured(METHODS["fedbiot"], EXPERIMENT, seed=0, remove=0.5).heal == Heal(
        steps=500, spare_ends=True, realign_steps=10
    )
    healed = dataclasses.replace(EXPERIMENT, heal=Heal(steps=30))
    assert configured(METHODS["fedbiot"], healed, seed=0, remove=0.5).heal.steps == 30


def test_the_axes_say_what_a_row_chooses() -> None:
    assert METHODS["fedot"].axes == {
        "data": "clients",
        "score": "uniform",
        "heal": "experiment, spare_ends",
        "blocks": "[0, 1, -2, -1]",
        "regulariser": "none",
        "merge": "mean",
        "space": "experiment",
        "server_optimizer": "none",
        "fuse": "plug-in",
    }
    assert METHODS["zero-shot"].axes == dict.fromkeys(METHODS["zero-shot"].axes, "none")
    assert METHODS["fedproxy"].axes["score"] == METHODS["fedproxy"].axes["heal"] == "experiment"
    assert METHODS["fedproxy-paper"].axes["heal"] == "none"


def test_a_variant_is_its_method_but_for_what_it_sets() -> None:
    variant = Variant("wide", "fedbiot", heal={"steps": 7}, federate={"regulariser_strength": 9.0})
    rows = methods_of(Compare(methods=["pcr", "fedbiot"], variant=(variant,)))
    assert list(rows) == ["fedbiot", "pcr", "wide"]
    found, base = (configured(rows[name], EXPERIMENT, seed=1, remove=0.5) for name in ("wide", "fedbiot"))
    assert found.heal == dataclasses.replace(base.heal, steps=7)
    assert found.federate == dataclasses.replace(base.federate, regulariser_strength=9.0)
    assert (found.compress, found.train) == (base.compress, base.train)
    assert rows["fedbiot"] is METHODS["fedbiot"]
    assert list(methods_of(Compare())) == list(METHODS)
