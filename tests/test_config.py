import tomllib

import pytest

from fedproxy.config import from_folder, load_experiment, parse_experiment, seconds, to_toml
from fedproxy.errors import ArtifactError, ConfigError

CHOICES = {"score": ["block-influence"], "merge": ["mean", "ties", "h-ties"], "regulariser": ["none", "pcr"]}


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


def problems(raw, folder):
    with pytest.raises(ConfigError) as caught:
        parse_experiment(raw, source="e.toml", folder=folder)
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
    text = "\n".join(found)
    assert len(found) == 11
    assert 'Did you mean "name"?' in text
    assert 'Did you mean "learning_rate"?' in text
    assert 'Did you mean "h-ties"?' in text
    assert "remove = 1.0: must be at least 0 and below 1" in text
    assert "samples = 'many': must be whole number" in text
    assert "missing.txt does not exist" in text


@pytest.mark.parametrize(
    ("clients", "says"),
    [
        ([], "There are no clients"),
        ([{"name": "a", "data": "bank.jsonl"}, {"name": "a", "data": "bank.jsonl"}], 'Two clients are called "a"'),
        ([{"name": "a"}], "needs either data = FILE or task = NAME"),
        ([{"name": "a", "data": "bank.jsonl", "task": "sst2"}], "needs either"),
        ([{"name": "../a", "task": "sst2"}], "name = '../a'"),
        ([{"name": "a", "task": "sst2", "rows": 0}], "rows = 0: must be greater than 0"),
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


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"quorum": 0}, "quorum = 0: must be a share"),
        ({"quorum": 1.5}, "quorum = 1.5: must be a share"),
        ({"quorum": float("nan")}, "quorum = nan: must be a finite number"),
        ({"quorum": True}, "quorum = True: must be whole number or number"),
        ({"quorum": 2}, "quorum = 2: there are 1 clients"),
        ({"participation": 0.0}, "participation = 0.0: must be above 0"),
        ({"deadline": "soon"}, 'deadline = \'soon\': must be a duration such as "30m", or "" for none'),
        ({"patience": ""}, "patience = '': must be a duration"),
        ({"retries": -1}, "retries = -1: must be 0 or more"),
        ({"max_norm": 0.0}, "max_norm = 0.0: must be greater than 0"),
        ({"max_norm_ratio": 1.0}, "max_norm_ratio = 1.0: must be greater than 1"),
        ({"strikes": 0}, "strikes = 0: must be greater than 0"),
        ({"keep_rounds": -1}, "keep_rounds = -1: must be 0 or more"),
    ],
)
def test_impossible_rounds(folder, table, says):
    with pytest.raises(ConfigError) as caught:
        federate(folder, **table)
    assert any(says in problem for problem in caught.value.problems)


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
    assert "rows = 0: must be greater than 0" in "".join(
        problems(raw | {"partition": {"task": "x", "rows": 0}}, folder)
    )


VARIANT = {"name": "strong", "method": "fedproxy", "federate": {"merge_options": {"rho": 2}, "deadline": "5m"}}
METHODS = {"methods": ["fedavg", "fedproxy"]}


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


@pytest.mark.parametrize(
    ("variants", "says"),
    [
        ({"name": "a"}, "double brackets"),
        ([VARIANT, VARIANT], 'variant 2] name = "strong": another'),
        ([VARIANT | {"name": "fedavg"}], 'name = "fedavg": another'),
        ([VARIANT | {"name": "../x"}], "name = '../x': must be 1 to 64"),
        ([VARIANT | {"method": "fedprxy"}], 'Did you mean "fedproxy"'),
        ([{"name": "a", "method": "fedproxy"}], "sets nothing"),
        ([VARIANT | {"compress": {"remove": 0.25}}], "ratios"),
        ([VARIANT | {"evaluate": {"limit": 3}}], 'no key "evaluate"'),
        ([VARIANT | {"train": {"epoch": 3}}], 'variant "strong": .train. has no key "epoch"'),
        ([VARIANT | {"train": {"epochs": "3"}}], 'variant "strong": .train. epochs'),
        ([VARIANT | {"train": 3}], "train = 3: must be table"),
        ([VARIANT | {"federate": {"merge": "tis"}}], 'variant "strong": .*merge = "tis"'),
        ([VARIANT | {"fuse": {"scale": "auto"}}], 'variant "strong": .*public'),
    ],
)
def test_impossible_variants(folder, variants, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_experiment(
            good() | {"compare": {"variant": variants}}, source="e.toml", folder=folder
        )
    assert len(caught.value.problems) == 1
