import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

import fedproxy
from fedproxy.config import TRACKERS
from fedproxy.errors import ConfigError, UsageError
from fedproxy.federation.messages import Closed
from fedproxy.federation.tracking import FOLDER, Tracker, check_trackers
from fedproxy.pipeline import read_experiment
from tests.test_pipeline import write_experiment


class Recorder(GeneralTracker):
    """A tracker that remembers."""

    name, requires_logging_directory, tracker = "recorder", False, None

    def __init__(self):
        super().__init__()
        self.lines = []

    def log(self, values, step=None, **kwargs):
        self.lines.append((step, values))


def closed(number, steps):
    client = {"steps": steps, "loss": 0.5, "seconds": 2.0, "tokens_per_second": 8.0, "peak_memory_bytes": 64}
    analysis = {"conflict_mean": 0.25, "names": ["bank"], "heterogeneity": [1.0], "weights": [1.0], "retention": [0.9]}
    record = {"clients": {"bank": {**client, "bytes_up": 4, "bytes_down": 8}}, "quarantined": [], "analysis": analysis}
    return Closed(number, {}, {}, {}, {}, record)


def recorded(steps):
    recorder = Recorder()
    accelerator = Accelerator(log_with=recorder)
    accelerator.init_trackers("test")
    return recorder, Tracker(accelerator, steps)


def test_the_axis_counts_the_steps_of_all_clients():
    recorder, tracker = recorded(100)
    tracker.step("bank", 0.9)
    tracker.step("bank", 0.7)
    tracker.round_closed(closed(3, 2), 1.5)
    tracker.step("bank", 0.6)
    assert [step for step, _ in recorder.lines] == [101, 102, 102, 103]
    assert recorder.lines[0][1] == {"bank/step_loss": 0.9}
    assert recorder.lines[2][1] == {
        "round": 3,
        "round/seconds": 1.5,
        "round/clients": 1,
        "round/rejected": 0,
        "round/conflict_mean": 0.25,
        "bank/loss": 0.5,
        "bank/seconds": 2.0,
        "bank/tokens_per_second": 8.0,
        "bank/peak_memory_bytes": 64,
        "bank/bytes_up": 4,
        "bank/bytes_down": 8,
        "bank/heterogeneity": 1.0,
        "bank/weights": 1.0,
        "bank/retention": 0.9,
    }


def test_a_rule_that_weighs_nobody_tells_no_weight():
    recorder, tracker = recorded(0)
    outcome = closed(1, 2)
    outcome.record["analysis"]["weights"] = None
    tracker.round_closed(outcome, 1.0)
    assert "bank/weights" not in recorder.lines[0][1]


def test_clients_elsewhere_move_the_axis_by_their_rounds():
    recorder, tracker = recorded(0)
    tracker.round_closed(closed(1, 30), 1.0)
    tracker.round_closed(closed(2, 12), 1.0)
    assert [step for step, _ in recorder.lines] == [30, 42]


def test_no_tracker_is_told_nothing():
    tracker = Tracker(None, 0)
    tracker.step("bank", 0.1)
    tracker.round_closed(closed(1, 1), 1.0)


def test_the_trackers_are_those_of_accelerate():
    assert set(TRACKERS) <= set(LOGGER_TYPE_TO_CLASS)


def test_a_missing_library_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr("fedproxy.federation.tracking.get_available_trackers", lambda: ["wandb"])
    check_trackers(["wandb"])
    with pytest.raises(UsageError, match="names comet_ml, aim, which is not installed: pip install comet-ml aim,"):
        check_trackers(["wandb", "comet_ml", "aim"])


def with_tracker(folder, llm, calibration, names):
    path = write_experiment(folder, llm, calibration, rounds=2)
    path.write_text(path.read_text().replace("[train]\n", f"[train]\nreport_to = {names}\n"))
    return path


def test_a_run_whose_tracker_is_missing_does_not_begin(tmp_path, tiny_checkpoint, calibration, monkeypatch):
    monkeypatch.setattr("fedproxy.federation.tracking.get_available_trackers", list)
    path = with_tracker(tmp_path, tiny_checkpoint(), calibration, '["tensorboard"]')
    with pytest.raises(UsageError, match="pip install tensorboard"):
        fedproxy.federate(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_a_problem_of_the_file(tmp_path, tiny_checkpoint, calibration):
    path = with_tracker(tmp_path, tiny_checkpoint(), calibration, '["tensorbord"]')
    with pytest.raises(ConfigError, match=r"\[train\] report_to = \['tensorbord'\]: must be some of aim, "):
        read_experiment(path)


def test_tensorboard_has_every_step_and_round_and_no_path(tmp_path, tiny_checkpoint, calibration):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fedproxy.federate(with_tracker(tmp_path, tiny_checkpoint(), calibration, '["tensorboard"]'), tmp_path / "run")
    folder = run.path / FOLDER / "fedproxy"
    events = EventAccumulator(str(folder))
    events.Reload()
    clients = [record["clients"] for record in run.rounds]
    for name in ("colours", "numbers"):
        assert len(events.Scalars(f"{name}/step_loss")) == sum(client[name]["steps"] for client in clients)
        found = [each.value for each in events.Scalars(f"{name}/loss")]
        assert found == pytest.approx([client[name]["loss"] for client in clients])
    assert [each.value for each in events.Scalars("round")] == [1, 2]
    for file in folder.rglob("*"):
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes()
    assert (run.path / "events.jsonl").is_file()
