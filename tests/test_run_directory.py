import dataclasses

import pytest

from fedproxy.artifacts import read_json
from fedproxy.config import LLM, Client, Compare, Compress, Evaluate, Experiment, Variant
from fedproxy.errors import UsageError
from fedproxy.run_directory import RunDirectory

EXPERIMENT = Experiment(LLM("llm"), Compress(calibration="text"))


def test_a_run_killed_in_its_first_moment_can_begin_again(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / ".experiment.toml.tmp-abc").write_text("half")
    RunDirectory(path, EXPERIMENT, resume=False, overwrite=False)
    assert sorted(p.name for p in path.iterdir()) == ["environment.json", "experiment.toml"]


def test_a_run_killed_before_its_environment_was_written_gets_it_on_resume(tmp_path):
    path = tmp_path / "run"
    RunDirectory(path, EXPERIMENT, resume=False, overwrite=False)
    (path / "environment.json").unlink()
    RunDirectory(path, EXPERIMENT, resume=True, overwrite=False)
    assert read_json(path / "environment.json")["versions"]


def test_a_folder_that_is_no_run_keeps_everything(tmp_path):
    (tmp_path / ".draft.tmp-1").write_text("mine")
    with pytest.raises(UsageError, match="no run of fedproxy"):
        RunDirectory(tmp_path, EXPERIMENT, resume=True, overwrite=False)
    assert (tmp_path / ".draft.tmp-1").read_text() == "mine"


def test_a_folder_with_an_experiment_file_of_the_user_is_no_run(tmp_path):
    (tmp_path / "experiment.toml").write_text("# mine")
    with pytest.raises(UsageError, match="no run of fedproxy"):
        RunDirectory(tmp_path, EXPERIMENT, resume=False, overwrite=True)
    assert (tmp_path / "experiment.toml").read_text() == "# mine"


def test_a_run_that_holds_what_is_read_is_not_replaced(tmp_path):
    path, dear = tmp_path / "run", tmp_path / "run" / "deep" / "dear"
    RunDirectory(path, EXPERIMENT, resume=False, overwrite=False)
    dear.mkdir(parents=True)
    for changes in (
        {"llm": LLM(str(dear))},
        {"compress": Compress(calibration=str(dear))},
        {"client": (Client("bank", data="elsewhere"), Client("shop", data=str(dear)))},
        {"evaluate": Evaluate(data=str(path))},
        {"compare": Compare(variant=(Variant("healed", "fedproxy", heal={"text": str(dear)}),))},
    ):
        with pytest.raises(UsageError, match="which is read"):
            RunDirectory(path, dataclasses.replace(EXPERIMENT, **changes), resume=False, overwrite=True)
    assert dear.is_dir()
    RunDirectory(path, EXPERIMENT, resume=False, overwrite=True)
    assert not dear.exists()


def test_a_run_goes_on_or_starts_anew(tmp_path):
    path = tmp_path / "run"
    RunDirectory(path, EXPERIMENT, resume=False, overwrite=False).event("begun")
    with pytest.raises(UsageError, match="Give one of them"):
        RunDirectory(path, EXPERIMENT, resume=True, overwrite=True)
    assert (path / "events.jsonl").is_file()


def test_seconds_add_up_over_resumes_and_survive_a_torn_line(tmp_path):
    path = tmp_path / "run"
    directory = RunDirectory(path, EXPERIMENT, resume=False, overwrite=False)
    for seconds in (1.5, 2.0):
        directory.event("stage_ended", stage="federate", seconds=seconds)
    with open(path / "events.jsonl", "a") as file:
        file.write('{"event": "stage_en')
    assert directory.seconds() == {"federate": 3.5}
