"""Cells in processes of their own: the same cells, and nothing left running whatever ends them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedproxy.artifacts import read_json
from fedproxy.comparison import compare
from fedproxy.comparison.cells import Key
from fedproxy.comparison.crew import PROGRAM_BYTES, processes
from fedproxy.errors import ArtifactError, ResourceError, UsageError
from fedproxy.pipeline import read_experiment
from tests.comparison.conftest import timeless

Write = Callable[..., Path]
TABLE = 'seeds = [0, 1]\nmethods = ["zero-shot", "zero-shot-proxy", "fedavg", "proxy-tuning"]\n'


def children(parent: int) -> list[int]:
    """The processes that `parent` started and that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


def test_two_processes_make_the_same_cells_as_one(experiment_file: Write, tmp_path: Path) -> None:
    file, told, seen = experiment_file(TABLE.replace("[0, 1]", "[0]"), blocks=4), list[Any](), set[Key]()
    one = compare(file, tmp_path / "one", jobs=1)
    two = compare(
        file,
        tmp_path / "two",
        jobs=2,
        on_progress=lambda key, *_: seen.add(key),
        on_cell=lambda cell: told.append((cell["method"], cell["seed"])),
    )
    assert timeless(two) == timeless(one)
    assert sorted(told) == sorted((cell["method"], cell["seed"]) for cell in one["cells"])
    assert {(name, seed) for name, seed, _ in seen} <= set(told)
    for path in (tmp_path / "one" / "cells").glob("**/*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    trainings = [tmp_path / name / "work" / "trainings" for name in ("one", "two")]
    assert sorted(os.listdir(trainings[0])) == sorted(os.listdir(trainings[1]))  # what two cells need was made once
    assert not children(os.getpid())


@pytest.mark.slow
def test_a_process_that_is_killed_is_a_want_of_memory(experiment_file: Write, tmp_path: Path) -> None:
    def kill_one(key: Key, *_: object) -> None:
        if key[0] == "fedavg":
            os.kill(children(os.getpid())[0], signal.SIGKILL)

    file = experiment_file(TABLE, blocks=4)
    with pytest.raises(ResourceError, match=r"code -9.*--resume"):
        compare(file, tmp_path / "out", jobs=2, on_progress=kill_one)
    assert not children(os.getpid())
    assert len(compare(file, tmp_path / "out", resume=True)["cells"]) == 8


@pytest.mark.long
def test_an_error_in_a_process_is_raised_here(experiment_file: Write, tmp_path: Path) -> None:
    file = experiment_file(TABLE, blocks=4)
    broken = tmp_path / "out" / "cells" / "fedavg"

    def damage(key: Key, *_: object) -> None:
        broken.parent.mkdir(parents=True, exist_ok=True)
        if not broken.exists():
            broken.write_text("a file where a folder should be")

    with pytest.raises((UsageError, ArtifactError, ResourceError), match="fedavg"):
        compare(file, tmp_path / "out", jobs=2, on_progress=damage)
    assert not children(os.getpid())


@pytest.fixture
def running(experiment_file: Write, tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", list[int]]]:
    """The command with two processes at work, and these."""
    command = [sys.executable, "-m", "fedproxy", "compare", str(experiment_file(TABLE, blocks=4))]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out"), "--jobs", "2"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it in the background
    )
    with process:
        assert eventually(lambda: (tmp_path / "out" / "work").exists())
        yield process, children(process.pid)
        process.kill()


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_process_outlives_the_command(
    running: tuple["subprocess.Popen[str]", list[int]], number: signal.Signals, code: int
) -> None:
    process, workers = running
    assert len(workers) == 2
    process.send_signal(number)
    assert process.wait(60) == code
    assert eventually(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def test_as_many_as_memory_allows(experiment_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = read_experiment(experiment_file(TABLE, blocks=4))
    monkeypatch.setattr("fedproxy.comparison.crew.available_memory", lambda: PROGRAM_BYTES // 2)
    assert processes(experiment) == 1
    monkeypatch.setattr("fedproxy.comparison.crew.available_memory", lambda: PROGRAM_BYTES << 10)
    assert processes(experiment) == len(os.sched_getaffinity(0))


@pytest.mark.long
def test_a_cell_that_is_left_has_the_threads_of_the_others(
    experiment_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are left after a kill: the last bits hang on the number of threads."""
    file, threads, popen = (
        experiment_file('seeds = [0, 1]\nmethods = ["zero-shot"]\n', blocks=4),
        list[str](),
        subprocess.Popen,
    )

    def recorded(*arguments: Any, **options: Any) -> Any:
        if "env" in options:  # not git
            threads.append(options["env"]["OMP_NUM_THREADS"])
        return popen(*arguments, **options)

    monkeypatch.setattr("fedproxy.comparison.crew.os.sched_getaffinity", lambda process: range(8))
    monkeypatch.setattr("fedproxy.comparison.crew.subprocess.Popen", recorded)
    compare(file, tmp_path / "out", jobs=2)
    shutil.rmtree(tmp_path / "out" / "cells" / "zero-shot" / "seed-1-remove-0.25")
    compare(file, tmp_path / "out", resume=True)
    assert threads == ["4", "4", "4"]


def test_the_number_is_kept(experiment_file: Write, tmp_path: Path) -> None:
    file = experiment_file('seeds = [0]\nmethods = ["zero-shot"]\n', blocks=4)
    compare(file, tmp_path / "out", jobs=3)
    compare(file, tmp_path / "out", resume=True)
    assert read_json(tmp_path / "out" / "jobs.json") == {"jobs": 3}
    with pytest.raises(UsageError, match="jobs = 0"):
        compare(file, tmp_path / "out", resume=True, jobs=0)
    for damaged in ('{"jobs": "two"}', '{"jobs": 0}', "[2]"):
        (tmp_path / "out" / "jobs.json").write_text(damaged)
        with pytest.raises(ArtifactError, match="Give --jobs"):
            compare(file, tmp_path / "out", resume=True)


def test_one_comparison_at_a_time(experiment_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = experiment_file('seeds = [0]\nmethods = ["zero-shot"]\n', blocks=4)
    compare(file, tmp_path / "out", jobs=1)
    monkeypatch.setattr("fedproxy.run_directory.ENDING_SECONDS", 0.1)

    def second(cell: object) -> None:
        with pytest.raises(UsageError, match="Another process"):
            compare(file, tmp_path / "out", overwrite=True)
        seen.append(cell)

    seen: list[object] = []
    assert compare(file, tmp_path / "out", resume=True, on_cell=second)["cells"]
    assert len(seen) == 1


def test_a_record_says_nothing_about_the_machine(experiment_file: Write, tmp_path: Path) -> None:
    file = experiment_file('seeds = [0]\nmethods = ["zero-shot"]\n', blocks=4)
    text = json.dumps(compare(file, tmp_path / "out", jobs=1)["experiment"])
    assert str(file.parent) not in text
    assert '"include": "."' in text
