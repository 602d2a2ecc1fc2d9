"""A kill or a full disk at every moment of a job: what was complete stays, nothing half passes for whole.

Run again, every job ends in what one that was never interrupted ends in.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedproxy
from fedproxy.artifacts import MANIFEST, Manifest, new_directory, write_json
from fedproxy.compression.compress import compress
from fedproxy.config import Heal
from fedproxy.errors import ResourceError
from fedproxy.federation.client_state import ClientState, Memory
from fedproxy.federation.messages import Closed
from fedproxy.federation.store import RoundStore
from fedproxy.fusion import fuse
from tests.conftest import BLOCKS
from tests.crashes import failing, moments
from tests.fusion.test_fuse import make_adapter
from tests.test_pipeline import write_experiment

Make = Callable[[Path, str], None]


def contents(path: Path) -> dict[str, bytes]:
    """Every file's bytes, without the lines that tell how long something took."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    timed = {file: file.read_bytes().split(b"\n") for file in files}
    return {
        str(file.relative_to(path)): b"\n".join(line for line in lines if b'seconds"' not in line)
        for file, lines in timed.items()
    }


def put_back(state: Path, place: Path) -> None:
    """Make `place` what it was at that moment."""
    shutil.rmtree(place)
    shutil.copytree(state, place, symlinks=True)


def make_directory(path: Path, value: str) -> None:
    with new_directory(path, overwrite=True) as folder:
        write_json(folder / MANIFEST, value)
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text(value * 1000)


@pytest.mark.parametrize("before", ["", "old"])
@pytest.mark.parametrize("make", [make_directory, write_json])
def test_an_artifact_is_absent_or_the_old_or_the_new_one(make: Make, before: str, tmp_path: Path) -> None:
    whole = {}
    for value in ("old", "new"):
        make(tmp_path / value, value)
        whole[value] = contents(tmp_path / value)
    place = tmp_path / "place"
    place.mkdir()
    if before:
        make(place / "it", before)
    begin = shutil.copytree(place, tmp_path / "begin")
    states = moments(lambda: make(place / "it", "new"), place, tmp_path / "kept")
    assert contents(states[-1] / "it") == whole["new"]
    for state in states:
        if (state / "it").exists():
            assert contents(state / "it") in whole.values()
        else:
            assert not before or [contents(old) for old in state.glob(".it.old-*/it")] == [whole["old"]]
        put_back(state, place)
        make(place / "it", "new")
        assert contents(place / "it") == whole["new"]
        assert [path.name for path in place.iterdir()] == ["it"]
    for number in range(1, 100):
        put_back(begin, place)
        with failing(place, number) as calls, contextlib.suppress(ResourceError):
            make(place / "it", "new")
        if len(calls) < number:
            break
        left = sorted(path.name for path in place.iterdir())
        assert left == ["it"] or (not before and left == [])
        assert not left or contents(place / "it") in whole.values()
        make(place / "it", "new")
        assert contents(place / "it") == whole["new"]
        assert [path.name for path in place.iterdir()] == ["it"]
    assert number > 3


def closed(number: int) -> Closed:
    tensors = [{"w": torch.full((50,), float(number + part))} for part in range(4)]
    return Closed(number, *tensors, {"round": number})  # type: ignore[arg-type]


def test_a_round_is_stored_whole_or_not_at_all_and_none_before_it_is_lost(tmp_path: Path) -> None:
    place = tmp_path / "place"
    for number in (1, 2):
        RoundStore(place, keep=1).save(closed(number), seconds=1)
    RoundStore(place).spool()
    begin = shutil.copytree(place, tmp_path / "begin")

    def save() -> None:
        RoundStore(place, keep=1).save(closed(3), seconds=1)

    states = moments(save, place, tmp_path / "kept")
    last = contents(place)
    for state in states:
        stored = RoundStore(state, keep=1).latest()
        assert stored is not None
        assert stored.adapter["w"].tolist() == [float(stored.round)] * 50
        assert [record["round"] for record in RoundStore(state).records()] == list(range(1, stored.round + 1))
        assert stored.round in (2, 3)
        if stored.round == 2:
            put_back(state, place)
            save()
            assert contents(place) == last
    for number in range(1, 100):
        put_back(begin, place)
        with failing(place, number) as calls, contextlib.suppress(ResourceError):
            save()
        if len(calls) < number:
            break
        stored = RoundStore(place).latest()
        assert stored is not None
        assert stored.adapter["w"].tolist() == [float(stored.round)] * 50
    assert number > 3


def test_what_a_client_remembers_is_that_of_the_round_that_it_is_asked_for(tmp_path: Path) -> None:
    def memory(number: int) -> Memory:
        return Memory({"w": torch.full((50,), float(number))}, {"w": torch.full((50,), -float(number))})

    def value(folder: Path, number: int) -> float | None:
        found = ClientState(folder).before(number).residual
        return None if found is None else found["w"].mean().item()

    place = tmp_path / "place"
    for number in (1, 2):
        ClientState(place).after(number, number - 1, memory(number))
    for state in moments(lambda: ClientState(place).after(3, 2, memory(3)), place, tmp_path / "kept"):
        assert value(state, 2) == 2.0
        assert value(state, 3) in (None, 3.0)
        ClientState(state).after(3, 2, memory(3))
        assert (value(state, 2), value(state, 3)) == (2.0, 3.0)
        assert sorted(path.name for path in state.iterdir()) == ["0003.safetensors", "0004.safetensors"]


HEAL: dict[str, Any] = {"steps": 4, "save_every": 2, "batch_size": 2, "max_length": 24, "lora_r": 4, "held_out": 2}
STAGES = ["prune", "score", "heal-lora", "heal-full", "fuse-checkpoint", "fuse-adapter"]


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=pytest.mark.long if "heal" in stage else []) for stage in STAGES]
)
def test_a_stage_leaves_the_whole_artifact_or_none(
    stage: str, tiny_checkpoint: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    kind, _, how = stage.partition("-")
    llm, place = tiny_checkpoint(num_hidden_layers=2 if kind == "heal" else BLOCKS), tmp_path / "place"
    place.mkdir()
    if kind == "fuse":
        _, adapter = make_adapter(llm, tmp_path / "adapter")

    def work() -> None:
        if kind == "fuse":
            fuse(llm, adapter, place / "out", form=how)
        elif kind == "heal":
            heal = Heal(mode=how, **HEAL)  # type: ignore[arg-type]
            compress(llm, place / "out", calibration=calibration, max_length=24, heal=heal)
        elif kind == "score":
            compress(llm, place / "out", calibration=calibration, max_length=64, batch_size=1, placement="stream")
        else:
            compress(llm, place / "out", score="uniform")

    states = moments(work, place, tmp_path / "kept")
    expected = contents(place / "out")
    assert len(states) > 5
    for state in states[:: 2 if kind == "heal" else 1]:
        if (state / "out").exists():
            assert contents(state / "out") == expected
            Manifest.read(state / "out")
            continue
        put_back(state, place)
        work()
        assert contents(place / "out") == expected
        assert [path.name for path in place.iterdir()] == ["out"]


@pytest.fixture
def experiment(tmp_path: Path, tiny_checkpoint: Callable[..., Path], calibration: Path) -> Path:
    """Two rounds of two clients that remember something: SCAFFOLD's variates and what a lossy wire lost."""
    extra = 'regulariser = "scaffold"\nspace = "frozen-a"\nwire = "int4"\nkeep_rounds = 1\n'
    path = write_experiment(tmp_path, tiny_checkpoint(num_hidden_layers=2), calibration, rounds=2, extra=extra)
    path.write_text(path.read_text().replace("regulariser_strength = 1.0\n", ""))
    return path


def tensors(run: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(run).items() if name.endswith(".safetensors")}


def check_rounds(run: Path, whole: Path) -> None:
    """Every round that is there is whole, and the one of a run without a kill."""
    for number in range(1, RoundStore(run / "rounds").count() + 1):
        found, expected = (tensors(path / "rounds" / f"{number:04d}") for path in (run, whole))
        assert expected.items() <= found.items()
        assert json.loads((run / "rounds" / f"{number:04d}" / "round.json").read_text())["round"] == number
    for name in ("proxy", "start", "adapter"):
        assert not (run / name).exists() or contents(run / name) == contents(whole / name)


@pytest.mark.slow
def test_a_run_that_is_resumed_after_a_kill_at_any_moment_ends_in_the_same_bits(
    experiment: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    run, whole = place / "run", tmp_path / "whole"
    states = moments(lambda: fedproxy.federate(experiment, run), place, tmp_path / "kept", halves=False)
    shutil.copytree(run, whole)
    assert len(states) > 40
    for state in states:
        check_rounds(state / "run", whole)
    for state in states[::3]:
        put_back(state, place)
        fedproxy.federate(experiment, run, resume=True)
        assert tensors(whole).items() <= tensors(run).items()
        assert not list(run.rglob(".*.tmp-*"))


@pytest.mark.slow
def test_a_run_whose_disk_is_full_at_any_moment_says_so_and_goes_on_when_it_is_not(
    experiment: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    fedproxy.federate(experiment, whole)
    for number in range(1, 1000, 17):
        shutil.rmtree(run, ignore_errors=True)
        with failing(tmp_path, number) as calls, contextlib.suppress(ResourceError):
            fedproxy.federate(experiment, run, resume=True)
        if len(calls) < number:
            break
        check_rounds(run, whole)
        fedproxy.federate(experiment, run, resume=True)
        assert tensors(whole).items() <= tensors(run).items()
    assert number > 50
