import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import tomllib

import pytest

from fedproxy import run_directory
from fedproxy.artifacts import read_json, write_json
from fedproxy.config import LLM, Client, Compare, Compress, Evaluate, Experiment, Federate, Fuse, Train, Variant
from fedproxy.errors import ArtifactError, UsageError
from fedproxy.run_directory import RunDirectory, owned

EXPERIMENT = Experiment(LLM("llm"), Compress(calibration="text"))


def begin(path, experiment=EXPERIMENT, *, resume=False, overwrite=False):
    with owned(path, experiment, resume=resume, overwrite=overwrite):
        pass


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_directory, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(run_directory, "ENDING_SECONDS", 0.1)


@pytest.fixture
def run(tmp_path):
    """A run with a complete round, and what a process writes while it is at work on another."""
    path = tmp_path / "run"
    begin(path)
    (path / "rounds" / "0001").mkdir(parents=True)
    (path / ".adapter.tmp-1").mkdir()
    (path / "proxy").symlink_to(tmp_path)
    return path


def contents(path):
    return {item: item.stat().st_mtime_ns for item in path.rglob("*")}


def test_a_run_killed_in_its_first_moment_can_begin_again(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / ".experiment.toml.tmp-abc").write_text("half")
    (path / ".owner").touch()
    begin(path)
    assert sorted(p.name for p in path.iterdir()) == [".lock", ".owner", "environment.json", "experiment.toml"]


def test_a_run_killed_before_its_environment_was_written_gets_it_on_resume(tmp_path):
    path = tmp_path / "run"
    begin(path)
    (path / "environment.json").unlink()
    begin(path, resume=True)
    assert read_json(path / "environment.json")["versions"]


def test_a_folder_that_is_no_run_keeps_everything(tmp_path):
    (tmp_path / ".draft.tmp-1").write_text("mine")
    with pytest.raises(UsageError, match="no run of fedproxy"):
        begin(tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == [".draft.tmp-1"]
    assert (tmp_path / ".draft.tmp-1").read_text() == "mine"


def test_a_folder_with_an_experiment_file_of_the_user_is_no_run(tmp_path):
    (tmp_path / "experiment.toml").write_text("# mine")
    with pytest.raises(UsageError, match="no run of fedproxy"):
        begin(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.toml"]
    assert (tmp_path / "experiment.toml").read_text() == "# mine"


def test_a_run_that_holds_what_is_read_is_not_replaced(tmp_path):
    path, dear = tmp_path / "run", tmp_path / "run" / "deep" / "dear"
    begin(path)
    dear.mkdir(parents=True)
    for changes in (
        {"llm": LLM(str(dear))},
        {"compress": Compress(calibration=str(dear))},
        {"client": (Client("bank", data="elsewhere"), Client("shop", data=str(dear)))},
        {"evaluate": Evaluate(data=str(path))},
        {"compare": Compare(variant=(Variant("healed", "fedproxy", heal={"text": str(dear)}),))},
    ):
        with pytest.raises(UsageError, match="which is read"):
            begin(path, dataclasses.replace(EXPERIMENT, **changes), overwrite=True)
    assert dear.is_dir()
    begin(path, overwrite=True)
    assert not dear.exists()


def test_a_run_goes_on_or_starts_anew(tmp_path):
    path = tmp_path / "run"
    begin(path)
    RunDirectory(path).event("begun")
    with pytest.raises(UsageError, match="Give one of them"):
        begin(path, resume=True, overwrite=True)
    assert (path / "events.jsonl").is_file()


def test_seconds_add_up_over_resumes_and_survive_a_torn_line(tmp_path):
    directory = RunDirectory(tmp_path)
    for seconds in (1.5, 2.0):
        directory.event("stage_ended", stage="federate", seconds=seconds, outcome="done")
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "stage_en')
    assert directory.seconds() == {"federate": 3.5}


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_nobody_touches_a_run_that_another_is_at_work_on(run, how):
    with owned(run, EXPERIMENT, resume=True, overwrite=False):
        (run / ".fused.tmp-1").mkdir()
        before = contents(run)
        with pytest.raises(UsageError, match=r"run\b"):
            begin(run, **how)
        assert contents(run) == before
    begin(run, resume=True)
    assert not list(run.glob(".*.tmp-*"))


def test_a_run_is_let_go_after_an_error(run):
    with pytest.raises(KeyboardInterrupt), owned(run, EXPERIMENT, resume=True, overwrite=False):
        raise KeyboardInterrupt
    begin(run, resume=True)


def test_to_overwrite_leaves_nothing_of_the_run_before_and_goes_no_further(run, tmp_path):
    (tmp_path / "kept.txt").touch()
    begin(run, overwrite=True)
    assert sorted(p.name for p in run.iterdir()) == [".lock", ".owner", "environment.json", "experiment.toml"]
    assert (tmp_path / "kept.txt").exists()


def events(path):
    return [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, {"outcome": "done"}),
        (ArtifactError("row 3 is no row"), {"outcome": "failed", "error": "row 3 is no row"}),
        (ZeroDivisionError(), {"outcome": "failed", "error": "ZeroDivisionError()"}),
        (KeyboardInterrupt(), {"outcome": "interrupted"}),
    ],
)
def test_the_log_says_how_a_stage_ended(tmp_path, error, outcome):
    directory = RunDirectory(tmp_path)
    with contextlib.suppress(type(error) if error else ()), directory.stage("fuse"):
        if error:
            raise error
    started, ended = events(tmp_path)
    assert started["event"] == "stage_started"
    assert ended["event"] == "stage_ended"
    assert {key: ended[key] for key in ended.keys() - {"time", "event", "seconds", "stage"}} == outcome


def test_what_ended_a_stage_is_told_though_it_cannot_be_logged(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ArtifactError, match="row 3"), RunDirectory(tmp_path / "run").stage("fuse"):
        (tmp_path / "run").rename(tmp_path / "moved")
        raise ArtifactError("row 3 is no row")


def test_the_log_says_that_a_run_is_gone_on_with_in_a_line_of_its_own(run):
    RunDirectory(run).event("answered")
    with open(run / "events.jsonl", "a") as file:
        file.write('{"event": "round_cl')
    begin(run, resume=True)
    first, torn, last = (run / "events.jsonl").read_text().splitlines()
    assert json.loads(first)["event"] == "answered"
    assert torn == '{"event": "round_cl'
    assert json.loads(last)["event"] == "resumed"
    begin(run, resume=True)
    assert len((run / "events.jsonl").read_text().splitlines()) == 4


HOLD = """
import sys, time
from pathlib import Path
from fedproxy.config import LLM, Compress, Experiment
from fedproxy.run_directory import RunDirectory, owned
experiment, path = Experiment(LLM("llm"), Compress(calibration="text")), Path(sys.argv[2])
how = owned(path, experiment, resume=True, overwrite=False) if sys.argv[1] == "owner" else RunDirectory(path).driven()
with how:
    print(flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("role", "says"), [("owner", "at work"), ("driver", "drives")])
def test_a_killed_process_lets_a_run_go(run, role, says):
    with subprocess.Popen([sys.executable, "-c", HOLD, role, str(run)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UsageError, match=says):
            begin(run, overwrite=True)
        assert (run / "rounds" / "0001").is_dir()
        process.kill()
    begin(run, overwrite=True)
    assert not (run / "rounds").exists()


@pytest.fixture
def project(tmp_path):
    """A project that was moved: where it was, where it is, and the run that was begun before."""
    old, new = tmp_path / "was", tmp_path / "is"
    (old / "llm").mkdir(parents=True)
    (old / "text").write_text("public")
    begin(tmp_path / "run", of(old))
    old.rename(new)
    return old, new, tmp_path / "run"


def of(folder, **changes):
    clients = tuple(Client(name, data=str(folder / f"{name}.jsonl")) for name in ("bank", "shop"))
    return dataclasses.replace(
        Experiment(LLM(str(folder / "llm")), Compress(calibration=str(folder / "text")), clients), **changes
    )


def stored(run):
    return tomllib.loads((run / "experiment.toml").read_text(encoding="utf-8"))


def test_a_project_that_was_moved_goes_on_and_is_read_where_it_is(project):
    _, new, run = project
    begin(run, of(new), resume=True)
    assert stored(run)["compress"]["calibration"] == str(new / "text")


def test_a_copy_of_a_project_goes_on_while_what_is_read_is_the_same(project):
    old, new, run = project
    shutil.copytree(new, old)
    begin(run, of(new), resume=True)
    (old / "text").write_text("other text")
    with pytest.raises(UsageError, match=r"\[compress\] calibration was .*is/text.*was/text"):
        begin(run, of(old), resume=True)


@pytest.mark.parametrize(
    ("changes", "key", "values"),
    [
        ({"seed": 7}, "seed", "was 0, is 7"),
        ({"train": Train(lora_r=3)}, "[train] lora_r", "was 32, is 3"),
        ({"federate": Federate(quorum=1, rounds=9)}, "[federate] rounds", "was 10, is 9"),
        ({"client": (Client("bank", data="/bank.jsonl"),)}, "[client 2] name", "was 'shop', is 'not set'"),
    ],
)
def test_another_experiment_is_refused_with_the_keys_that_differ(project, changes, key, values):
    _, new, run = project
    before = contents(run)
    with pytest.raises(UsageError) as caught:
        begin(run, of(new, **changes), resume=True)
    assert f"{key} {values}" in str(caught.value)
    assert "calibration" not in str(caught.value)
    assert contents(run) == before


def test_whom_a_round_waits_for_may_be_another(run):
    """What the error of a round without a quorum tells to change, and no more."""
    waiting = Federate(deadline="1h", quorum=1, retries=7, patience="3h")
    begin(run, dataclasses.replace(EXPERIMENT, federate=waiting), resume=True)
    held = stored(run)["federate"]
    assert [held[key] for key in ("deadline", "quorum", "retries", "patience")] == ["1h", 1, 7, "3h"]
    assert (run / "rounds" / "0001").is_dir()
    with pytest.raises(UsageError, match="strikes") as caught:
        begin(
            run,
            dataclasses.replace(EXPERIMENT, federate=dataclasses.replace(waiting, quorum=2, strikes=9)),
            resume=True,
        )
    assert "quorum" not in str(caught.value)
    assert stored(run)["federate"] == held


@pytest.mark.parametrize(
    ("table", "changed"), [("evaluate", Evaluate(limit=3)), ("fuse", Fuse(scale=0.7))], ids=["evaluate", "fuse"]
)
def test_what_is_evaluated_or_fused_may_be_another_and_is_scored_anew(run, table, changed):
    names = ("evaluation.json", "validation.json", "results.json")
    for name in names:
        write_json(run / name, {})
    begin(run, dataclasses.replace(EXPERIMENT, name="other"), resume=True)
    assert all((run / name).exists() for name in names)
    begin(run, dataclasses.replace(EXPERIMENT, **{table: changed}), resume=True)
    assert not any((run / name).exists() for name in names)
    assert {"evaluate": "limit = 3", "fuse": "scale = 0.7"}[table] in (run / "experiment.toml").read_text()
    assert (run / "rounds" / "0001").is_dir()


@pytest.mark.parametrize(("table", "made"), [("fuse", "fused"), ("evaluate", "work")])
def test_what_shaped_something_that_is_there_is_fixed(run, table, made):
    first, second = {
        "fuse": (Fuse(scale=0.5), Fuse(scale=0.7)),
        "evaluate": (Evaluate(limit=3), Evaluate(limit=4)),
    }[table]
    begin(run, dataclasses.replace(EXPERIMENT, **{table: first}), resume=True)
    (run / made).mkdir()
    with pytest.raises(UsageError, match=rf"\[{table}\]"):
        begin(run, dataclasses.replace(EXPERIMENT, **{table: second}), resume=True)


def test_a_byte_order_mark_makes_no_other_experiment(run):
    file = run / "experiment.toml"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    begin(run, resume=True)


@pytest.mark.parametrize(
    ("rows", "others"),
    [
        ({"a": [{"text": "2"}, {"text": "1"}], "b": [{"text": "3"}]}, "of a"),
        ({"a": [{"text": "1"}, {"text": "2"}], "b": []}, "of b"),
        ({"a": [{"text": "3"}], "b": [{"text": "1"}, {"text": "2"}]}, "of a, b"),
    ],
)
@pytest.mark.parametrize("made", ["rounds", "cells"])
def test_other_rows_are_told_once_something_was_trained(tmp_path, rows, others, made):
    directory, first = RunDirectory(tmp_path), {"a": [{"text": "1"}, {"text": "2"}], "b": [{"text": "3"}]}
    for before in (rows, first):
        directory.check_same_rows(before)
    (tmp_path / made).mkdir()
    directory.check_same_rows(first)
    with pytest.raises(UsageError, match=others):
        directory.check_same_rows(rows)


def test_rows_without_a_note_get_one(tmp_path):
    (tmp_path / "rounds").mkdir()
    for rows in ({"a": [1]}, {"b": [2]}):
        RunDirectory(tmp_path).check_same_rows(rows)
    with pytest.raises(UsageError, match="of a, b"):
        RunDirectory(tmp_path).check_same_rows({"a": [], "b": []})


@pytest.mark.parametrize("damaged", ["{", "[]", '{"a": 5}', '{"sha256": {"a": 5}}'])
def test_a_damaged_note_of_the_rows_is_named(tmp_path, damaged):
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rows.json").write_text(damaged)
    with pytest.raises(ArtifactError, match=r"rows\.json"):
        RunDirectory(tmp_path).check_same_rows({"a": [1]})
