import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fedproxy
from fedproxy.artifacts import Manifest, read_json
from fedproxy.errors import ArtifactError, ConfigError, FederationError, MissingExtraError, UsageError
from fedproxy.federation import client as client_module
from fedproxy.federation import client_rows
from fedproxy.forecast import forecast_run, given_speed
from fedproxy.pipeline import run
from fedproxy.records import Results
from fedproxy.reporting.page import load_events
from fedproxy.typed_json import read_record

WORDS = {"colours": ["red", "green", "blue"], "numbers": ["one", "two", "three"]}


def write_experiment(folder: Path, llm: Path, calibration: Path, *, extra: str = "", rounds: int = 3) -> Path:
    clients = ""
    for name, words in WORDS.items():
        rows = [{"prompt": f"say {word} {i}:", "completion": f" {word}"} for i in range(4) for word in words]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        clients += f'\n[[client]]\nname = "{name}"\ndata = "{name}.jsonl"\n'
    path = folder / "experiment.toml"
    path.write_text(
        f'name = "words"\n[llm]\npath = "{llm}"\n[compress]\ncalibration = "{calibration}"\nmax_length = 32\n{clients}'
        "\n[train]\nbatch_size = 4\nlearning_rate = 1e-2\nlora_r = 2\nlora_alpha = 4\nmax_length = 32\n"
        f"[federate]\nrounds = {rounds}\nregulariser_strength = 1.0\n{extra}"
    )
    return path


@pytest.fixture
def experiment(tmp_path, tiny_checkpoint, calibration):
    return write_experiment(tmp_path, tiny_checkpoint(), calibration)


def adapter_bytes(path):
    return (path / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_same_experiment_gives_the_same_bytes_and_a_resumed_one_too(experiment, tmp_path):
    first = fedproxy.federate(experiment, tmp_path / "1")
    fedproxy.federate(experiment, tmp_path / "2")
    assert adapter_bytes(tmp_path / "1") == adapter_bytes(tmp_path / "2")
    assert [record["round"] for record in first.rounds] == [1, 2, 3]
    # What a kill after round 1 leaves: one complete round, half of the next, no adapter.
    shutil.rmtree(tmp_path / "2" / "adapter")
    shutil.rmtree(tmp_path / "2" / "rounds" / "0003")
    (tmp_path / "2" / "rounds" / "0002").rename(tmp_path / "2" / "rounds" / ".0002.tmp-x")
    (tmp_path / "2" / ".adapter.tmp-x").mkdir()
    fedproxy.federate(experiment, tmp_path / "2", resume=True)
    assert adapter_bytes(tmp_path / "1") == adapter_bytes(tmp_path / "2")
    for number in ("0001", "0002", "0003"):
        for name in ("adapter.safetensors", "conflict.safetensors"):
            files = [tmp_path / run / "rounds" / number / name for run in ("1", "2")]
            assert files[0].read_bytes() == files[1].read_bytes()
    assert not list((tmp_path / "2").rglob("*.tmp-*"))


def test_a_project_that_is_moved_after_a_kill_ends_in_the_same_bits(tmp_path, tiny_checkpoint, calibration):
    (tmp_path / "before").mkdir()
    llm, text = tmp_path / "before" / "llm", tmp_path / "before" / "public.txt"
    shutil.copytree(tiny_checkpoint(), llm)
    shutil.copy(calibration, text)
    experiment = write_experiment(tmp_path / "before", llm, text)
    fedproxy.federate(experiment, tmp_path / "whole")
    fedproxy.federate(experiment, tmp_path / "before" / "run")
    shutil.rmtree(tmp_path / "before" / "run" / "adapter")
    shutil.rmtree(tmp_path / "before" / "run" / "rounds" / "0003")
    (tmp_path / "before").rename(tmp_path / "after")
    moved = tmp_path / "after" / "experiment.toml"
    moved.write_text(moved.read_text().replace(str(tmp_path / "before"), str(tmp_path / "after")))
    fedproxy.federate(moved, tmp_path / "after" / "run", resume=True)
    assert adapter_bytes(tmp_path / "after" / "run") == adapter_bytes(tmp_path / "whole")


def test_a_run_goes_on_with_the_rows_of_its_rounds_alone(experiment, tmp_path):
    whole, run_ = fedproxy.federate(experiment, tmp_path / "whole"), tmp_path / "run"
    file, rounds = tmp_path / "numbers.jsonl", run_ / "rounds"
    rows = file.read_text()
    fedproxy.federate(experiment, run_)
    shutil.rmtree(run_ / "adapter")
    shutil.rmtree(rounds / "0003")
    file.write_text(rows.replace("say one 0:", "say one 9:"))
    with pytest.raises(UsageError, match="numbers"):
        fedproxy.federate(experiment, run_, resume=True)
    file.write_text(rows)
    fedproxy.federate(experiment, run_, resume=True)
    assert adapter_bytes(run_) == adapter_bytes(whole.path)
    shutil.rmtree(rounds)  # a run without a round is none of any rows yet
    shutil.rmtree(run_ / "adapter")
    file.write_text(rows.replace("say one 0:", "say one 9:"))
    fedproxy.federate(experiment, run_, resume=True)
    assert adapter_bytes(run_) != adapter_bytes(whole.path)


def test_the_seed_matters(experiment, tmp_path):
    fedproxy.federate(experiment, tmp_path / "1")
    experiment.write_text("seed = 1\n" + experiment.read_text())
    fedproxy.federate(experiment, tmp_path / "2")
    assert adapter_bytes(tmp_path / "1") != adapter_bytes(tmp_path / "2")


def test_a_run_leaves_what_the_contract_promises(experiment, tmp_path, tiny_checkpoint):
    results = run(experiment, tmp_path / "run")
    path = tmp_path / "run"
    names = {p.name for p in path.iterdir()}
    assert names >= {"experiment.toml", "environment.json", "proxy", "rounds", "adapter", "fused", "results.json"}
    assert read_json(path / "results.json") == json.loads(json.dumps(results))
    typed = read_record(path / "results.json", Results)
    assert (typed.name, typed.seed, typed.proxy.layer_map) == (
        results["name"],
        results["seed"],
        results["proxy"]["layer_map"],
    )
    assert typed.gap_closed == results["gap_closed"]
    sheet = read_json(path / "proxy" / "fedproxy.json")["settings"]["exposure"]
    assert results["proxy"]["perplexity"] == {who: sheet["perplexity"][who] for who in ("llm", "proxy")}
    told = [event for event in load_events(path) if event["event"] == "hindrance"]
    assert [{key: event[key] for key in ("kind", "found", "advice")} for event in told] == results["hindrances"]
    assert {name: scored.average for name, scored in typed.evaluation.items()} == {
        name: scored["average"] for name, scored in results["evaluation"].items()
    }
    assert typed.cost.model_dump(by_alias=True) == results["cost"]
    assert [each.number for each in typed.rounds] == [each["round"] for each in results["rounds"]]
    record = read_json(path / "rounds" / "0002" / "round.json")
    assert record["analysis"]["names"] == ["colours", "numbers"]
    client = record["clients"]["colours"]
    assert set(client) >= {"rows", "tokens", "steps", "loss", "seconds", "wire", "bytes_up", "bytes_down"}
    assert client["tokens_per_second"] == pytest.approx(client["tokens"] / client["seconds"])
    assert client["peak_memory_bytes"] > 10 << 20
    llm = AutoModelForCausalLM.from_pretrained(tiny_checkpoint())
    PeftModel.from_pretrained(llm, path / "fused")
    assert str(tmp_path) not in (path / "fused" / "README.md").read_text()
    proxy = AutoModelForCausalLM.from_pretrained(path / "proxy")
    PeftModel.from_pretrained(proxy, path / "adapter")
    assert Manifest.read(path / "adapter").layer_map == Manifest.read(path / "proxy").layer_map


def test_rows_that_are_cut_are_told_once_and_recorded(experiment, tmp_path, caplog):
    caplog.set_level(logging.INFO, "fedproxy.federation.inline")
    pairs = ("say:", " x"), ("say:" * 10, " x"), ("say:", " x" * 40)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    (tmp_path / "numbers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fedproxy.federate(experiment, tmp_path / "run")
    told = [record.getMessage() for record in caplog.records if record.name == "fedproxy.federation.inline"]
    assert told == ["[train] max_length: 2 of 3 rows of numbers are cut."]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(one["cut"], one["left_out"]) for one in events if one["event"] == "rows_encoded"] == [({"numbers": 2}, {})]


def test_each_row_is_encoded_once(experiment, tmp_path, monkeypatch):
    """By the early check, for the rounds, and for the training on pooled rows."""
    experiment.write_text(experiment.read_text() + "[evaluate]\ncentralized = true\n")
    seen, real = [], client_rows.training_examples
    monkeypatch.setattr(
        client_rows, "training_examples", lambda rows, *given, **named: seen.extend(rows) or real(rows, *given, **named)
    )
    run(experiment, tmp_path / "run")
    texts = [row["prompt"] for row in seen]
    assert len(texts) == len(set(texts)) > 0


def test_the_conflict_of_a_round_is_that_of_its_updates(experiment, tmp_path):
    fedproxy.federate(experiment, tmp_path / "run")
    conflict = load_file(tmp_path / "run" / "rounds" / "0001" / "conflict.safetensors")
    values = torch.cat([t.flatten() for t in conflict.values()])
    assert set(values.unique().tolist()) <= {0.0, 0.5, 1.0}
    record = read_json(tmp_path / "run" / "rounds" / "0001" / "round.json")
    assert float(values.mean()) == pytest.approx(record["analysis"]["conflict_mean"], abs=1e-6)


def test_an_earlier_run_is_neither_lost_nor_mixed(experiment, tmp_path):
    out = tmp_path / "run"
    fedproxy.federate(experiment, out)
    before = adapter_bytes(out)
    with pytest.raises(UsageError, match="--resume"):
        fedproxy.federate(experiment, out)
    experiment.write_text(experiment.read_text().replace("1e-2", "1e-3"))
    with pytest.raises(UsageError, match="another experiment"):
        fedproxy.federate(experiment, out, resume=True)
    assert adapter_bytes(out) == before
    fedproxy.federate(experiment, out, overwrite=True)
    assert adapter_bytes(out) != before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="is no run"):
        fedproxy.federate(experiment, other, overwrite=True)
    assert (other / "thesis.txt").exists()


def test_a_second_process_leaves_a_run_at_work_alone(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("fedproxy.run_directory.ENDING_SECONDS", 0.1)
    fedproxy.federate(experiment, tmp_path / "alone")
    refused = []

    def second(stage, fraction, text):
        if stage == "federate" and text.startswith("round 2") and not refused:
            for how in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(UsageError, match="Another process"):
                    fedproxy.federate(experiment, tmp_path / "run", **how)
                refused.append(how)

    fedproxy.federate(experiment, tmp_path / "run", on_progress=second)
    assert len(refused) == 2
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "alone")
    fedproxy.federate(experiment, tmp_path / "run", overwrite=True)


def test_bad_data_is_found_before_anything_is_written(experiment, tmp_path):
    (tmp_path / "numbers.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    with pytest.raises(ArtifactError, match=r"numbers\.jsonl.*2"):
        fedproxy.federate(experiment, tmp_path / "run")
    (tmp_path / "numbers.jsonl").write_text("")
    with pytest.raises(ArtifactError, match=r"numbers\.jsonl"):
        fedproxy.federate(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wrong_merge_options_are_found_before_anything_is_written(tmp_path, tiny_checkpoint, calibration):
    path = write_experiment(tmp_path, tiny_checkpoint(), calibration, extra="merge_options = { roh = 1.1 }\n")
    with pytest.raises(UsageError, match="rho"):
        fedproxy.federate(path, tmp_path / "run")
    path = write_experiment(tmp_path, tiny_checkpoint(), calibration, extra='merge = "hties"\n')
    with pytest.raises(ConfigError, match="h-ties"):
        fedproxy.federate(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_extra_is_found_before_anything_is_written(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("fedproxy.models.quantization.is_bitsandbytes_available", lambda: False)
    experiment.write_text(experiment.read_text().replace("[train]\n", '[train]\nquantization = "4bit"\n'))
    with pytest.raises(MissingExtraError, match="fedproxy\\[qlora\\]"):
        fedproxy.federate(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_poisoned_update_is_left_out_and_the_run_goes_on(experiment, tmp_path, monkeypatch):
    honest = client_module.adapter_state

    def poisoned(model):
        state = honest(model)
        calls.append(1)
        if len(calls) == 2:  # the first reply is of "colours", the second of "numbers"
            next(iter(state.values()))[0] = float("nan")
        return state

    calls = []
    monkeypatch.setattr(client_module, "adapter_state", poisoned)
    with pytest.raises(FederationError, match=r"numbers: .*NaN"):
        fedproxy.federate(experiment, tmp_path / "strict")
    experiment.write_text(experiment.read_text() + "quorum = 0.5\n")
    calls.clear()
    tolerant = fedproxy.federate(experiment, tmp_path / "tolerant")
    assert [list(record["clients"]) for record in tolerant.rounds] == [["colours"], *[["colours", "numbers"]] * 2]
    assert tolerant.rounds[0]["quarantined"][0]["client"] == "numbers"


@pytest.mark.parametrize("rule", ["mean", "ties"])
@pytest.mark.parametrize("regulariser", ["none", "fedprox"])
def test_every_rule_and_regulariser_runs(tmp_path, tiny_checkpoint, calibration, rule, regulariser):
    extra = f'merge = "{rule}"\nregulariser = "{regulariser}"\n'
    path = write_experiment(tmp_path, tiny_checkpoint(), calibration, extra=extra, rounds=2)
    assert len(fedproxy.federate(path, tmp_path / "run").rounds) == 2


def test_a_partition_makes_clients(experiment, tmp_path):
    text = experiment.read_text()
    head, _, rest = text.partition("[[client]]")
    tail = "[train]" + rest.partition("[train]")[2]
    (tmp_path / "all.jsonl").write_text((tmp_path / "colours.jsonl").read_text())
    cut = '[partition]\ndata = "all.jsonl"\nclients = 3\nscheme = "dirichlet"\nalpha = 1.0\n'
    experiment.write_text(head + cut + tail.replace("rounds = 3", "rounds = 1"))
    [record] = fedproxy.federate(experiment, tmp_path / "run").rounds
    assert list(record["clients"]) == ["client-1", "client-2", "client-3"]
    assert sum(client["rows"] for client in record["clients"].values()) == 12


def test_every_model_asked_for_is_scored_on_the_clients_tasks(tmp_path, tiny_checkpoint, calibration):
    (tmp_path / "colour.yaml").write_text(
        "task: colour\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        "    train: rows.jsonl\n    test: rows.jsonl\n"
        "training_split: train\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: 'Colour of {{text}}:'\n"
        "doc_to_target: label\ndoc_to_choice: ['red', 'blue']\nmetric_list:\n  - metric: acc\n"
    )
    rows = [{"text": f"thing {i}", "label": i % 2} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "experiment.toml"
    path.write_text(
        f'[llm]\npath = "{tiny_checkpoint()}"\n[compress]\ncalibration = "{calibration}"\nmax_length = 32\n'
        '[[client]]\nname = "a"\ntask = "colour"\nrows = 6\n[[client]]\nname = "b"\ntask = "colour"\n'
        "[train]\nbatch_size = 4\nlora_r = 2\nmax_length = 32\n[federate]\nrounds = 1\n"
        f'[evaluate]\ninclude = "{tmp_path}"\ncentralized = true\nlimit = 4\n'
    )
    results = run(path, tmp_path / "run")
    assert list(results["evaluation"]) == ["llm", "proxy", "proxy_tuned", "fused", "centralized"]
    assert all(scores["tasks"]["colour"]["n"] == 4 for scores in results["evaluation"].values())
    assert {name: c["rows"] for name, c in results["rounds"][0]["clients"].items()} == {"a": 6, "b": 8}
    assert {"compress", "federate", "fuse", "centralized", "evaluate"} <= results["cost"]["seconds"].keys()
    stored = (tmp_path / "run" / "centralized" / "adapter_model.safetensors").read_bytes()
    again = run(path, tmp_path / "run", resume=True)
    assert again["evaluation"] == results["evaluation"]
    assert (tmp_path / "run" / "centralized" / "adapter_model.safetensors").read_bytes() == stored


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_rows_are_cut_to_the_positions_that_the_model_has(family, tmp_path, tiny_checkpoint, calibration):
    (tmp_path / "text.txt").write_text(calibration.read_text() + "\n\n" + "a long document " * 20)
    extra = f'[fuse]\nscale = "auto"\npublic = "{tmp_path / "text.txt"}"\n[evaluate]\ncentralized = true\nmodels = []\n'
    path = write_experiment(tmp_path, tiny_checkpoint(family), calibration, extra=extra, rounds=1)
    row = json.dumps({"prompt": "say " * 50, "completion": " yes"})
    (tmp_path / "colours.jsonl").write_text("\n".join([row] * 4))
    path.write_text(path.read_text().replace("max_length = 32\n[federate]", "max_length = 300\n[federate]"))
    results = run(path, tmp_path / "run")
    assert results["rounds"][0]["clients"]["colours"]["tokens"] == 4 * 128
    foretold = forecast_run(path, given_speed(1.0))["clients"]["colours"]
    assert (foretold["rounds"][0]["tokens"], foretold["longest"], foretold["cut"]) == (4 * 128, 128, 4)


def test_a_tokenizer_without_padding_and_end_of_text(tmp_path, tiny_checkpoint, calibration):
    llm = tmp_path / "llm"
    shutil.copytree(tiny_checkpoint(), llm)
    settings = json.loads((llm / "tokenizer_config.json").read_text())
    (llm / "tokenizer_config.json").write_text(
        json.dumps({name: value for name, value in settings.items() if name not in ("eos_token", "pad_token")})
    )
    extra = "[evaluate]\ncentralized = true\nmodels = []\n"
    results = run(write_experiment(tmp_path, llm, calibration, extra=extra, rounds=1), tmp_path / "run")
    assert all(client["rows"] == 12 for client in results["rounds"][0]["clients"].values())


def test_central_training_takes_the_steps_of_those_whom_the_rounds_ask(tmp_path, tiny_checkpoint, calibration):
    extra = "participation = 0.5\nquorum = 1\n[evaluate]\ncentralized = true\nmodels = []\n"
    path = write_experiment(tmp_path, tiny_checkpoint(), calibration, extra=extra, rounds=2)
    told = []
    results = run(path, tmp_path / "run", on_progress=lambda stage, done, text: told.append((stage, text)))
    steps = sum(client["steps"] for record in results["rounds"] for client in record["clients"].values())
    assert [len(record["clients"]) for record in results["rounds"]] == [1, 1]
    assert len([text for stage, text in told if stage == "centralized" and text.startswith("step ")]) == steps
    flops = forecast_run(path, given_speed(1.0))["flops"]["centralized"]
    text = path.read_text().replace("participation = 0.5\nquorum = 1\n", "").replace("rounds = 2", "rounds = 1")
    path.write_text(text)  # both clients once, as many steps
    assert flops == forecast_run(path, given_speed(1.0))["flops"]["centralized"]


def test_central_training_that_diverges_blames_the_learning_rate(tmp_path, tiny_checkpoint, calibration):
    extra = 'merge = "mean"\n[evaluate]\ncentralized = true\nmodels = []\n'
    path = write_experiment(tmp_path, tiny_checkpoint(), calibration, extra=extra, rounds=1)
    path.write_text(path.read_text().replace("learning_rate = 1e-2", "learning_rate = 1e30\nmax_steps = 1"))
    with pytest.raises(UsageError, match=r"centralized.*nan.*2 of 2"):
        run(path, tmp_path / "run")


def test_an_unknown_task_is_found_before_anything_is_written(experiment, tmp_path):
    experiment.write_text(experiment.read_text() + '[evaluate]\ntasks = ["sst22"]\n')
    with pytest.raises(UsageError, match="sst2"):
        run(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()
