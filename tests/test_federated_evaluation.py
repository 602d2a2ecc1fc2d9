"""Clients that score: what they say is what `evaluate` says, and the round that is kept does not depend on the way."""

import json
import shutil

import pytest

import fedproxy
from fedproxy import held_back
from fedproxy.adapter_files import read_adapter, write_adapter
from fedproxy.artifacts import Manifest, read_json
from fedproxy.cli.output import tell_run
from fedproxy.cli.run import execute
from fedproxy.data import read_rows
from fedproxy.federation import session
from fedproxy.federation.client_rows import ClientRows, client_rows
from fedproxy.federation.store import RoundStore
from fedproxy.models.validating import BrokenModelError, labels_of
from fedproxy.pipeline import read_experiment
from fedproxy.records import Results
from fedproxy.reporting import report, use_it, validation_table
from fedproxy.run_directory import RunDirectory
from fedproxy.typed_json import as_record
from tests.test_pipeline import write_experiment

SETTINGS = 'validation = 0.25\nkeep = "best"\npatience_rounds = 2\nkeep_rounds = 1\nalone = true\n'


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_checkpoint, calibration):
    """An experiment whose loss soon rises, and its run."""
    folder = tmp_path_factory.mktemp("scored")
    path = write_experiment(folder, tiny_checkpoint(), calibration, extra=SETTINGS, rounds=9)
    path.write_text(path.read_text().replace("learning_rate = 1e-2", "learning_rate = 1e-1"))
    return path, fedproxy.federate(path, folder / "run")


def told(rounds):
    """What of the records does not depend on time."""
    return [(one["validation"], {name: c["validation"] for name, c in one["clients"].items()}) for one in rounds]


def test_the_best_round_is_kept_and_two_worse_ones_end_the_federation(whole):
    _, run = whole
    losses = [one["validation"]["global"]["loss"]["by_rows"] for one in run.rounds]
    best = losses.index(min(losses)) + 1
    assert best < len(losses) < 9
    assert len(losses) == best + 2
    assert [one["validation"]["stop"] for one in run.rounds] == [False] * (len(losses) - 1) + [True]
    assert run.rounds[-1]["validation"]["best_round"] == best
    kept = RoundStore(run.path / "rounds").adapter(best)
    _, tensors, manifest = read_adapter(run.adapter)
    assert manifest.settings["round"] == best
    assert all(bool((tensors[name] == kept[name]).all()) for name in kept)
    there = [
        number
        for number in range(1, len(losses) + 1)
        if (run.path / f"rounds/{number:04d}/adapter.safetensors").exists()
    ]
    assert there == [best, len(losses)]


def test_the_terminal_says_what_the_clients_reach_and_which_round_is_kept(whole, capsys):
    run = whole[1]
    best = run.rounds[-1]["validation"]["best_round"]
    tell_run(run, json=False)
    said = " ".join(capsys.readouterr().err.split())
    assert f"round {best}, which is kept" in said
    assert f"Of {len(run.rounds)} rounds the best is round {best}, so the federation ended early." in said
    tell_run(run, json=True)
    found = capsys.readouterr()
    assert json.loads(found.out)["adapter"] == str(run.adapter)
    assert "kept back" not in found.err


def test_what_is_kept_back_is_never_trained_on(whole):
    experiment = read_experiment(whole[0])
    rows = client_rows(experiment)
    for client in experiment.client:
        every = read_rows(client.data)
        own, held = rows[client.name], rows.held[client.name]
        assert len(held) == len(every) // 4
        assert [row for row in every if row in own] == own
        assert [row for row in every if row not in own] == held
        record = whole[1].rounds[0]["clients"][client.name]
        assert (record["rows"], record["validation"]["global"]["rows"]) == (len(own), len(held))


def write_tasks(rows, folder):
    """The rows that each client keeps back as a task of the harness."""
    for name in rows:
        labels = labels_of([*rows[name], *rows.held[name]])
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows.held[name])))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ntarget_delimiter: ''\n"
            f"doc_to_choice: {json.dumps(labels)}\ndoc_to_target: completion\n"
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        )


def test_the_accuracy_of_a_round_is_what_evaluate_says_of_the_same_rows(whole, tmp_path):
    path, run = whole
    rows, best = client_rows(read_experiment(path)), run.rounds[-1]["validation"]["best_round"]
    config, _, manifest = read_adapter(run.path / "start")
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", config, RoundStore(run.path / "rounds").adapter(best), manifest)
    write_tasks(rows, tmp_path)
    for model, adapter in (("untuned", None), ("global", tmp_path / "adapter")):
        found = fedproxy.evaluate(run.path / "proxy", tasks=list(rows), include=tmp_path, adapter=adapter)["tasks"]
        said = run.rounds[best - 1]["clients"]
        for name in rows:
            score = said[name]["validation"][model]
            assert (score["accuracy"], score["rows"]) == (pytest.approx(found[name]["acc"], abs=1e-6), found[name]["n"])


@pytest.mark.parametrize("half", ["train", "score"])
def test_a_run_that_is_killed_in_either_half_of_a_round_says_and_keeps_the_same(whole, tmp_path, monkeypatch, half):
    path, run = whole
    real = getattr(session.Session, half)

    def killed(self, client, order, *more):
        if (client, order.round) == ("numbers", 2):
            raise KeyboardInterrupt
        return real(self, client, order, *more)

    monkeypatch.setattr(session.Session, half, killed)
    with pytest.raises(KeyboardInterrupt):
        fedproxy.federate(path, tmp_path / "run")
    monkeypatch.undo()
    assert RoundStore(tmp_path / "run" / "rounds").count() == 1
    again = fedproxy.federate(path, tmp_path / "run", resume=True)
    assert told(again.rounds) == told(run.rounds)
    files = [one / "adapter_model.safetensors" for one in (again.adapter, run.adapter)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert Manifest.read(again.adapter) == Manifest.read(run.adapter)


def test_a_run_that_was_killed_after_its_last_round_ends_as_it_would_have(whole, tmp_path):
    path, run = whole
    shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    again = fedproxy.federate(path, tmp_path / "run", resume=True)
    assert again.rounds == run.rounds
    assert read_json(again.adapter / "fedproxy.json") == read_json(run.adapter / "fedproxy.json")


def test_without_a_task_the_report_says_what_came_of_it(whole, tmp_path, monkeypatch):
    path, run = whole
    shutil.copytree(run.path, tmp_path / "run")
    results = fedproxy.pipeline.run(path, tmp_path / "run", resume=True)
    best = run.rounds[-1]["validation"]["best_round"]
    assert (results["evaluation"], results["kept_round"]) == ({}, best)
    page = report(tmp_path / "run").read_text()
    assert f"the adapter of round {best} moves the loss of the proxy from" in " ".join(page.split())
    assert "Clients in round 1" in page
    table = validation_table(results)
    assert table.row_count == 6
    assert "The tuned LLM was not scored" not in page

    elsewhere = RunDirectory(tmp_path / "run"), ClientRows({}), lambda *told: None
    (tmp_path / "run" / "validation.json").rename(tmp_path / "validation.json")
    assert held_back.score_llm(read_experiment(path), *elsewhere) == {}
    assert held_back.example_prompt(read_experiment(path), ClientRows({})) is None
    (tmp_path / "validation.json").rename(tmp_path / "run" / "validation.json")

    found, rows = results["validation"], client_rows(read_experiment(path))
    write_tasks(rows, tmp_path)
    llm = read_experiment(path).llm.path
    for model, adapter in (("llm", None), ("fused", tmp_path / "run" / "fused")):
        scored = fedproxy.evaluate(llm, tasks=list(rows), include=tmp_path, adapter=adapter)["tasks"]
        said = {name: (one[model]["accuracy"], one[model]["rows"]) for name, one in found["clients"].items()}
        assert said == {name: (pytest.approx(one["acc"], abs=1e-6), one["n"]) for name, one in scored.items()}
        weighed = sum(one[model]["loss"] * one[model]["rows"] for one in found["clients"].values())
        assert found[model]["loss"]["by_rows"] == pytest.approx(weighed / found[model]["rows"])

    code = use_it(as_record(results, Results, "results"), tmp_path / "run")
    assert any(repr(row["prompt"]) in code for row in rows.held["colours"])
    exec(code, {})  # it answers

    def twice(*words, **more):
        raise AssertionError("it was measured before")

    monkeypatch.setattr(held_back, "measure", twice)
    assert fedproxy.pipeline.run(path, tmp_path / "run", resume=True)["validation"] == found
    assert validation_table({**results, "rounds": []}) is None


def test_a_tuned_llm_without_a_loss_costs_a_warning(whole, tmp_path, monkeypatch, caplog):
    path, run = whole
    shutil.copytree(run.path, tmp_path / "run")
    measured = iter([(1.0, 0.5), (1.0, 0.5)])

    def measure(*words, **more):
        if (found := next(measured, None)) is None:
            raise BrokenModelError("The loss on the validation rows is nan.")
        return found

    monkeypatch.setattr(held_back, "measure", measure)
    found = fedproxy.pipeline.run(path, tmp_path / "run", resume=True)["validation"]
    assert (found["llm"]["clients"], "fused" in found) == (2, False)
    assert caplog.text.count("tuned LLM on the rows that") == 2


def test_a_run_that_writes_to_a_file_says_its_rounds_what_came_of_it_and_how_to_use_it(
    tmp_path, tiny_checkpoint, calibration, capsys
):
    path = write_experiment(tmp_path, tiny_checkpoint(), calibration, extra="validation = 0.25\n", rounds=2)
    execute(path, tmp_path / "run", resume=False, overwrite=False, json=False)
    said = capsys.readouterr().err
    assert [line.split(" is stored")[0] for line in said.splitlines() if "is stored" in line] == ["Round 1", "Round 2"]
    assert "asked" not in said
    assert said.index("Tuned proxy") < said.index("LLM, untuned") < said.index("Use it:")
    assert f"PeftModel.from_pretrained(model, {str(tmp_path / 'run' / 'fused')!r})" in said
