import dataclasses
import json
import math
import tomllib
from importlib.metadata import EntryPoint

import pytest

from fedproxy.aggregation.merge import RULES
from fedproxy.config import (
    LLM,
    Client,
    Compare,
    Compress,
    Evaluate,
    Experiment,
    Federate,
    Fuse,
    Heal,
    Partition,
    TableError,
    Train,
    Variant,
    from_folder,
    load_experiment,
    parse_experiment,
    read_table,
    seconds,
    to_toml,
)
from fedproxy.errors import ArtifactError, ConfigError
from fedproxy.pipeline import read_experiment

NO_NUMBER = ["1", True, [], {}, math.nan, math.inf, -math.inf]
FLAG = ([True, False], [0, "true", []])
TEXT = (["", "x", "a b/ü"], [1, True, ["x"], {}])
COUNT = ([1, 7], [0, -1, 1.0, *NO_NUMBER])
NATURAL = ([0, 7], [-1, 0.0, *NO_NUMBER])
LENGTH = ([2, 512], [1, 0, -1, 2.0, *NO_NUMBER])
POSITIVE = ([1, 0.5, 1e-9], [0, -0.5, 10**400, *NO_NUMBER])
NOT_NEGATIVE = ([0, 0.0, 2], [-1e-9, *NO_NUMBER])
SHARE = ([0, 0.0, 0.999], [1, 1.0, -0.1, *NO_NUMBER])
OPTIONS = ([{}, {"rho": 1.2}], [1, [], "x"])
CLIENT = (["", "a", "Bank-1", "x" * 64], ["../a", "-a", "a b", "x" * 65, 1])


def choice(*good):
    return list(good), ["nobody", "", 1, [good[0]], True]


FIELDS = {
    LLM: {"path": TEXT, "trust_remote_code": FLAG},
    Compress: {
        "remove": SHARE,
        "score": choice("uniform", "block-influence"),
        **dict.fromkeys(("keep_first", "keep_last"), NATURAL),
        "calibration": TEXT,
        **dict.fromkeys(("samples", "batch_size"), COUNT),
        "max_length": LENGTH,
        "placement": choice("auto", "memory", "stream"),
    },
    Heal: {
        **dict.fromkeys(("refit", "steps", "realign_steps"), NATURAL),
        "mode": choice("lora", "full"),
        **dict.fromkeys(("learning_rate", "temperature"), POSITIVE),
        **dict.fromkeys(("batch_size", "top_k", "held_out", "lora_r", "save_every"), COUNT),
        "max_length": LENGTH,
        "hidden_weight": NOT_NEGATIVE,
        "text": TEXT,
        "spare_ends": FLAG,
    },
    Client: {"name": CLIENT, "data": TEXT, "task": TEXT, "rows": COUNT, "lora_r": COUNT},
    Partition: {
        **dict.fromkeys(("data", "task"), TEXT),
        **dict.fromkeys(("rows", "clients"), COUNT),
        "scheme": choice("iid", "dirichlet"),
        "alpha": POSITIVE,
    },
    Train: {
        **dict.fromkeys(("epochs", "learning_rate", "adam_epsilon", "max_grad_norm", "lora_alpha"), POSITIVE),
        **dict.fromkeys(("max_steps", "batch_size", "gradient_accumulation_steps", "lora_r"), COUNT),
        **dict.fromkeys(
            (
                "gradient_checkpointing",
                "completion_only_loss",
                "assistant_only_loss",
                "group_by_length",
                "padding_free",
            ),
            FLAG,
        ),
        "lr_scheduler_type": choice("constant", "linear", "cosine"),
        "warmup_steps": NATURAL,
        "weight_decay": NOT_NEGATIVE,
        **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), SHARE),
        "max_length": LENGTH,
        "precision": choice("auto", "bf16", "fp32"),
        "quantization": choice("none", "4bit"),
        "lora_targets": (["all-linear", ["q_proj"]], [1, ["a", 1], {}]),
        "blocks": (["all", [0, -1]], [[], "some", 1, [0, "1"], [True]]),
        "report_to": ([[], ["aim", "wandb"]], [["mlflow", "paper"], "aim", [1]]),
    },
    Federate: {
        **dict.fromkeys(("rounds", "strikes"), COUNT),
        "merge": choice("mean", "h-ties"),
        **dict.fromkeys(("merge_options", "server_options", "wire_options"), OPTIONS),
        "space": choice("factors", "product"),
        "server_optimizer": choice("none", "fedadam"),
        "regulariser": choice("none", "pcr", "scaffold"),
        "regulariser_strength": NOT_NEGATIVE,
        "wire": choice("fp32", "top-k"),
        "wire_down": (["fp32", "int8"], ["top-k", "nobody", 1]),
        "participation": ([0.1, 1], [0, 1.1, *NO_NUMBER]),
        "quorum": ([0.75, 1.0, 1, 9], [0, 0.0, 1.5, -1, *NO_NUMBER]),
        "deadline": (["", "30m", "1.5 h"], ["soon", "30", 30]),
        "patience": (["30m"], ["", "soon", 30]),
        **dict.fromkeys(("retries", "keep_rounds", "patience_rounds"), NATURAL),
        "max_norm": POSITIVE,
        "max_norm_ratio": ([1.5, 2], [1, 1.0, *NO_NUMBER]),
        "validation": ([0, 0.1, 0.5], [-0.1, 0.51, *NO_NUMBER]),
        "alone": FLAG,
        "secure": FLAG,
        "keep": (["last", "best"], ["first", 1]),
        "share_result": FLAG,
    },
    Fuse: {"scale": ([0, -0.5, "auto"], ["", "on", True, math.nan, math.inf, []]), "public": TEXT},
    Evaluate: {
        "tasks": ([[], ["sst2"]], ["sst2", [1]]),
        **dict.fromkeys(("data", "include"), TEXT),
        "trust_tasks": FLAG,
        **dict.fromkeys(("limit", "batch_size"), COUNT),
        "centralized": FLAG,
        "models": ([[], ["llm", "proxy_tuning"]], [["llm", "other"], "llm", [1]]),
    },
    Compare: {
        "methods": ([[], ["fedavg", "pcr"]], [["fedavg", "nobody"], "fedavg", [1]]),
        "seeds": ([[0], [2, 1]], [[], [-1], [1, 1], [0.0], [True], 1]),
        "ratios": ([[], [0, 0.5]], [[1.0], [0.5, 0.5], [-0.1], ["0.5"], [math.nan], 0.5]),
    },
    Variant: {
        "name": CLIENT,
        "method": (["", "fedavg", "fedproxy"], ["nobody", 1]),
        "compress": ([{}, {"score": "uniform"}], [{"scor": "uniform"}, {"score": "nobody"}, 1]),
        "heal": ([{"steps": 3}], [{"steps": -3}, {"step": 3}]),
        "train": ([{"learning_rate": 1}], [{"learning_rate": -1}, {"lr": 1}]),
        "federate": ([{"merge": "mean", "quorum": 1}], [{"merge": "nobody"}, {"quorum": 0}]),
        "fuse": ([{"scale": "auto"}], [{"scale": "on"}]),
    },
}
"""Table → key → values that it can have, and values that it cannot."""


def test_every_key_of_every_table_is_held_to_its_values():
    for kind, keys in FIELDS.items():
        assert set(keys) == {field.name for field in dataclasses.fields(kind)} - {"variant", "privacy"}


def read(kind, values):
    """A table as it is read from a file, and what is wrong with it."""
    problems = []
    text = to_toml({"t": values})
    return read_table(kind, tomllib.loads(text)["t"], "t", problems), problems


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in FIELDS.items() for key in keys])
def test_a_constructor_takes_and_refuses_what_the_file_does(kind, key):
    good, bad = FIELDS[kind][key]
    for value in good:
        made = kind(**{key: value})
        told, problems = read(kind, {key: value})
        assert (told, problems) == (made, [])
        assert getattr(made, key) == value
        assert type(getattr(told, key)) is type(getattr(made, key))
        assert dataclasses.replace(kind(), **{key: value}) == made
        assert read(kind, {k: v for k, v in dataclasses.asdict(made).items() if v is not None})[0] == made
    for value in bad:
        with pytest.raises(TableError) as caught:
            kind(**{key: value})
        assert isinstance(caught.value, ConfigError)
        assert list(caught.value.faults) == [key]
        assert f"[{kind.__name__.lower()}] {key} = {value!r:.20}"[:60] in str(caught.value)
        _, problems = read(kind, {key: value})
        assert problems == [f"[t] {fault}" for fault in caught.value.faults.values()]


def test_a_float_is_a_float_however_it_is_given():
    made = Train(epochs=2, lora_alpha=64)
    assert (type(made.epochs), type(made.lora_alpha)) == (float, float)
    assert [type(Federate(quorum=given).quorum) for given in (1, 1.0)] == [int, float]


def test_all_that_is_wrong_with_a_table_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        Federate(rounds=-3, regulariser="pcrr", wire="int4", ronds=2, merge=["mean"])
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for said in ("rounds = -3", "regulariser = 'pcrr'", '"pcr"', '"ronds"', '"rounds"', "merge = ['mean']"):
        assert said in text
    with pytest.raises(TableError, match="learning_rate"):
        dataclasses.replace(Train(), learning_rate=-1)
    with pytest.raises(TableError) as caught:
        Experiment(llm=LLM("x"), compress={"remove": 0.5}, seed=-1)
    assert set(caught.value.faults) == {"compress", "seed"}
    with pytest.raises(TableError) as caught:
        Train(0.0, epochs=1)
    assert set(caught.value.faults) == {"epochs"}


def test_names_that_another_package_adds_can_be_chosen(monkeypatch):
    monkeypatch.setattr(RULES, "_found", {"theirs": EntryPoint("theirs", "no.such:thing", RULES.group)})
    assert Federate(merge="theirs").merge == "theirs"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "public.txt").write_text("text")
    (tmp_path / "bank.jsonl").write_text("{}")
    return tmp_path


def good():
    return {
        "llm": {"path": "hub/model"},
        "compress": {"calibration": "public.txt"},
        "client": [{"name": "bank", "data": "bank.jsonl"}],
    }


def problems(raw, folder, **how):
    with pytest.raises(ConfigError) as caught:
        parse_experiment(raw, source="e.toml", folder=folder, **how)
    return caught.value.problems


def test_defaults_are_the_papers(folder):
    experiment = parse_experiment(good(), source="e.toml", folder=folder)
    assert experiment.compress.remove == 0.5
    assert (experiment.federate.merge, experiment.federate.regulariser) == ("h-ties", "pcr")
    assert (experiment.train.lora_r, experiment.train.lora_alpha, experiment.train.lora_dropout) == (32, 64, 0.1)
    assert (experiment.train.learning_rate, experiment.train.batch_size) == (5e-5, 16)


def test_relative_paths_count_from_the_file(folder):
    experiment = parse_experiment(good(), source="e.toml", folder=folder)
    assert experiment.client[0].data == str(folder / "bank.jsonl")
    assert experiment.llm.path == "hub/model"


def test_all_problems_are_reported_at_once(folder):
    raw = good()
    raw["nmae"] = "x"
    raw["seed"] = -1
    raw["compress"] |= {"remove": 1.0, "samples": "many", "calibration": "missing.txt"}
    raw["train"] = {"learning_rat": 1e-3, "epochs": 0, "batch_size": 1.5, "weight_decay": float("nan")}
    raw["federate"] = {"merge": "hties", "rounds": True}
    found = problems(raw, folder)
    wrong = ('"nmae"', "seed = -1", "[compress] remove = 1.0", "[compress] samples = 'many'", "missing.txt")
    wrong += ('[train] has no key "learning_rat"', "[train] epochs = 0", "[train] batch_size = 1.5")
    wrong += ("[train] weight_decay = nan", "[federate] merge = 'hties'", "[federate] rounds = True")
    assert all(sum(said in problem for problem in found) == 1 for said in wrong)
    assert len(found) == len(wrong)
    text = "\n".join(found)
    assert all(f'"{meant}"?' in text for meant in ("name", "learning_rate", "h-ties"))


@pytest.mark.parametrize(
    ("clients", "says"),
    [
        ([], "no clients"),
        ([{"name": "a", "data": "bank.jsonl"}, {"name": "a", "data": "bank.jsonl"}], 'Two clients are called "a"'),
        ([{"name": "a"}], "needs either data = FILE or task = NAME"),
        ([{"name": "a", "data": "bank.jsonl", "task": "sst2"}], "needs either"),
        ([{"name": "../a", "task": "sst2"}], "name = '../a'"),
        ([{"name": "a", "task": "sst2", "rows": 0}], "rows = 0"),
        ([{"name": "a b", "lora_r": 99}], "lora_r = 99"),
        ([{"data": "bank.jsonl"}], "[client 1]"),
        ([{"nam": "a", "data": "bank.jsonl"}], '"name"'),
        ([3], "[client 1]"),
        ({"name": "a"}, "[[client]]"),
    ],
)
def test_impossible_clients(folder, clients, says):
    raw = {**good(), "client": clients}
    assert any(says in problem for problem in problems(raw, folder))


def test_clients_and_partition_exclude_each_other(folder):
    raw = {**good(), "partition": {"data": "bank.jsonl"}}
    assert any("exclude each other" in problem for problem in problems(raw, folder))
    del raw["client"]
    assert parse_experiment(raw, source="e", folder=folder).partition.clients == 8


def test_resolved_experiment_survives_toml(folder):
    raw = good()
    raw["name"] = 'quoted "name" \\ with\ttab'
    raw["client"] += [{"name": "shop", "task": "sst2", "rows": 3}]
    raw["federate"] = {"merge_options": {"rho": 1.2}, "deadline": "30m"}
    raw["train"] = {"lora_targets": ["q_proj", "v_proj"], "learning_rate": 1e-4}
    experiment = parse_experiment(raw, source="e", folder=folder)
    text = to_toml(experiment.as_dict())
    again = parse_experiment(tomllib.loads(text), source="e", folder=folder)
    assert again == experiment
    assert to_toml(again.as_dict()) == text


def test_the_home_directory_is_found_for_the_llm_as_for_other_paths(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my-llm").mkdir()
    (tmp_path / "text.txt").write_text("text")
    raw = good()
    raw["llm"]["path"], raw["compress"]["calibration"] = "~/my-llm", "~/text.txt"
    found = parse_experiment(raw, source="e", folder=folder)
    assert (found.llm.path, found.compress.calibration) == (str(tmp_path / "my-llm"), str(tmp_path / "text.txt"))


def test_missing_file_and_broken_toml(tmp_path):
    with pytest.raises(ArtifactError, match="No such file"):
        load_experiment(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_experiment(tmp_path / "bad.toml")


def test_durations():
    assert [seconds("90s"), seconds("30m"), seconds("1.5 h")] == [90, 1800, 5400]
    with pytest.raises(ValueError, match="no duration"):
        seconds("soon")


def federate(folder, **table):
    raw = {**good(), "federate": table}
    return parse_experiment(raw, source="e", folder=folder)


def test_a_quorum_is_a_share_or_a_number_of_replies(folder):
    for given in (0.75, 1.0, 1):
        experiment = federate(folder, quorum=given)
        assert (experiment.federate.quorum, type(experiment.federate.quorum)) == (given, type(given))
        again = tomllib.loads(to_toml(experiment.as_dict()))["federate"]["quorum"]
        assert (again, type(again)) == (given, type(given))


def test_a_count_of_replies_beyond_the_clients_is_refused(folder):
    [problem] = problems(good() | {"federate": {"quorum": 2}}, folder)
    assert "quorum = 2" in problem


def test_a_count_is_held_against_the_clients_of_a_partition(folder):
    raw = {**good(), "partition": {"data": "bank.jsonl", "clients": 4}, "federate": {"quorum": 5}}
    del raw["client"]
    assert any("quorum = 5: there are 4 clients" in problem for problem in problems(raw, folder))


def test_a_partition_needs_data_or_a_task_and_not_both(folder):
    raw = {key: value for key, value in good().items() if key != "client"}
    found = parse_experiment(raw | {"partition": {"task": "sst2", "rows": 9}}, source="e", folder=folder)
    assert (found.partition.task, found.partition.rows, found.partition.data) == ("sst2", 9, "")
    for table in ({}, {"task": "sst2", "data": "bank.jsonl"}):
        assert problems(raw | {"partition": table}, folder) == ["[partition] needs either data = FILE or task = NAME."]
    assert "[partition] rows = 0" in "".join(problems(raw | {"partition": {"task": "x", "rows": 0}}, folder))


def test_clients_elsewhere_need_no_data_and_no_names(folder):
    raw = good() | {"client": [{"name": "bank", "data": "elsewhere.jsonl"}, {"name": "shop"}]}
    assert len(problems(raw, folder)) == 2
    found = parse_experiment(raw, source="e", folder=folder, remote=True)
    assert [client.name for client in found.client] == ["bank", "shop"]
    assert parse_experiment(raw | {"client": []}, source="e", folder=folder, remote=True).client == ()


def test_an_experiment_made_in_python_is_held_to_the_same(folder):
    raw = good() | {"federate": {"quorum": 3}, "fuse": {"scale": "auto"}}
    raw["client"] += [{"name": "bank", "data": "bank.jsonl", "lora_r": 64}]
    tables = {"federate": Federate(quorum=3), "fuse": Fuse(scale="auto")}
    clients = (Client("bank", "bank.jsonl"), Client("bank", "bank.jsonl", lora_r=64))
    made = Experiment(LLM("hub/model"), Compress(calibration="public.txt"), clients, **tables)
    with pytest.raises(ConfigError) as caught:
        read_experiment(made)
    assert caught.value.problems == problems(raw, folder)


def test_a_scale_chosen_by_text_and_the_text_need_each_other(folder):
    for table in ({"scale": "auto"}, {"public": "public.txt"}):
        [problem] = problems(good() | {"fuse": table}, folder)
        assert "[fuse]" in problem
    found = parse_experiment(good() | {"fuse": {"scale": "auto", "public": "public.txt"}}, source="e", folder=folder)
    assert found.fuse == Fuse("auto", str(folder / "public.txt"))


def test_a_clients_rank_is_held_against_that_of_training(folder):
    raw = good() | {"train": {"lora_r": 8}}
    raw["client"] = [{"name": "bank", "data": "bank.jsonl", "lora_r": 16}]
    assert len(problems(raw, folder)) == 2
    [problem] = problems(raw | {"federate": {"space": "product"}}, folder)
    assert "[client 1] lora_r = 16" in problem


VARIANT = {"name": "strong", "method": "fedproxy", "federate": {"merge_options": {"rho": 2}, "deadline": "5m"}}


def test_a_variants_settings_are_read_as_those_of_the_file(folder):
    raw = good() | {
        "compare": {"variant": [{**VARIANT, "train": {"learning_rate": 1}, "heal": {"text": "public.txt"}}]}
    }
    raw["train"] = {"epochs": 2}
    experiment = parse_experiment(raw, source="e.toml", folder=folder)
    [variant] = experiment.compare.variant
    assert variant.settings == {
        "heal": {"text": str(folder / "public.txt")},
        "train": {"learning_rate": 1.0},
        "federate": {"merge_options": {"rho": 2}, "deadline": "5m"},
    }
    again = parse_experiment(tomllib.loads(to_toml(experiment.as_dict())), source="e.toml", folder=folder)
    assert again == experiment
    told = from_folder(experiment.as_dict(), folder)["compare"]["variant"]
    assert told[0]["heal"] == {"text": "public.txt"}


def test_a_variants_settings_are_what_json_makes_of_them(folder):
    """A comparison holds them against those that its cells were recorded with."""
    budget = {"epsilon": 3.0, "delta": 0.1e-3, "clip": 1}
    varied = {**VARIANT, "train": {"padding_free": False, "privacy": {"epsilon": 3}}, "federate": {"privacy": budget}}
    raw = good() | {"compare": {"variant": [varied]}}
    [variant] = parse_experiment(raw, source="e.toml", folder=folder).compare.variant
    assert json.loads(json.dumps(variant.settings)) == variant.settings
    assert variant.settings["train"]["privacy"]["epsilon"] == 3


@pytest.mark.parametrize(
    ("variants", "says"),
    [
        ({"name": "a"}, "[[compare.variant]]"),
        ([VARIANT, VARIANT], 'variant 2] name = "strong"'),
        ([VARIANT | {"name": "fedavg"}], 'name = "fedavg"'),
        ([VARIANT | {"name": "../x"}], "name = '../x'"),
        ([VARIANT | {"method": "fedprxy"}], '"fedproxy"'),
        ([{"name": "a", "method": "fedproxy"}], "variant 1]"),
        ([VARIANT | {"compress": {"remove": 0.25}}], "remove"),
        ([VARIANT | {"evaluate": {"limit": 3}}], '"evaluate"'),
        ([VARIANT | {"train": {"epoch": 3}}], '"epochs"'),
        ([VARIANT | {"train": {"epochs": "3"}}], "epochs = '3'"),
        ([VARIANT | {"train": 3}], "train = 3"),
        ([VARIANT | {"federate": {"merge": "tis"}}], "merge = 'tis'"),
        ([VARIANT | {"federate": {"quorum": 7}}], 'variant "strong": [federate] quorum = 7'),
        ([VARIANT | {"fuse": {"scale": "auto"}}], 'variant "strong": [fuse]'),
        ([VARIANT | {"heal": {"text": "no.txt"}}], "no.txt"),
    ],
)
def test_impossible_variants(folder, variants, says):
    found = problems(good() | {"compare": {"variant": variants}}, folder)
    assert sum(says in problem for problem in found) == 1
    assert all("variant" in problem for problem in found)


@pytest.mark.parametrize(
    "raw", [{"llm": 3}, {"llm": [{}]}, {"compare": 3}, {"compare": {"variant": [3]}}, {"seed": {}}]
)
def test_what_is_no_table_is_said(folder, raw):
    assert any(str(next(iter(raw))) in problem for problem in problems(good() | raw, folder))
